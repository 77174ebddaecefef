"""Checks and times the persistent decode kernel on a Hopper GPU at the models' true dimensions, with random weights.

    python benchmarks/decode_step.py --check --models qwen-7b --variants '[{}, {"warps": 12}]' --phases

The check compares with a float32 step made of plain XLA operations on dequantized weights (‖e‖ / ‖ref‖). Times are
medians of differences of long and short runs, each call a launch over all timed layers (more than 256 MB), and the
16-bit lm_head's matrix product beside it; `tok/s` is one over their sum. `--phases` leaves phases out one at a time.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from pallas_kernels.decode_step import op  # noqa: E402
from pallas_kernels.kv_attention.tensor import KVArrays  # noqa: E402
from pallas_kernels.quantized_matmul import QuantizedTensor, mosaic_gpu  # noqa: E402
from qwen_jax.bench import timing  # noqa: E402

K = 128


@dataclasses.dataclass(frozen=True)
class Model:
    """Dimensions: layers, hidden, inner, heads, key/value heads, vocabulary; biases and norms of queries and keys."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 151936
    bias: bool = True
    qk_norm: bool = False


MODELS = {
    "small": Model(2, 256, 384, 2, 2),
    "small-gqa": Model(2, 512, 1024, 8, 2, bias=False, qk_norm=True),
    "small-gqa-bias": Model(2, 896, 1024, 7, 1),
    "qwen-1.8b": Model(24, 2048, 5504, 16, 16),
    "qwen-7b": Model(32, 4096, 11008, 32, 32),
    "qwen-14b": Model(40, 5120, 13696, 40, 40, 152064),
    "qwen-72b": Model(80, 8192, 24576, 64, 64, 152064),
    "qwen2.5-7b": Model(28, 3584, 18944, 28, 4, 152064),
    "qwen3-8b": Model(36, 4096, 12288, 32, 8, bias=False, qk_norm=True),
}


def random_weight(key, layers: int, rows: int, columns: int, group_size: int = 128) -> QuantizedTensor:
    """4 bits, symmetric, layout "mosaic_gpu"; any bits are a valid packing."""
    first, second = jax.random.split(key)
    padded = -(-columns // 64) * 64
    shape = (layers, rows // 128, padded // 16, 256)
    packed = jax.lax.bitcast_convert_type(jax.random.bits(first, shape, jnp.uint32), jnp.int32)
    scales = jax.random.uniform(second, (layers, rows // group_size, padded), jnp.float32, 0.5, 1.5)
    scales = (scales * (0.5 / (4.6 * rows**0.5))).astype(jnp.bfloat16)
    return QuantizedTensor(packed, scales, None, None, 4, group_size, rows, "mosaic_gpu", padded - columns)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def make(model: Model, layers: int, batch: int, length: int, quantized: bool):
    """(x, weights, cache, (cos, sin))."""
    keys = iter(jax.random.split(jax.random.key(layers + batch), 32))
    D, H, G = model.hidden, model.heads, model.kv_heads
    joint = (H + 2 * G) * K

    def vector(width, mean=0.0, deviation=1.0):
        return (mean + deviation * jax.random.normal(next(keys), (layers, width))).astype(jnp.bfloat16)

    qkv_bias = key_bias = None
    if model.bias:
        at = jnp.arange(joint)
        qkv_bias = jnp.where((at >= H * K) & (at < (H + G) * K), 0, vector(joint, 0, 0.2)).astype(jnp.bfloat16)
        key_bias = vector(G * K) + (jnp.arange(G * K) % K == K // 2 - 1).astype(jnp.bfloat16) * 50
    weights = op.LayerWeights(
        random_weight(next(keys), layers, D, joint),
        random_weight(next(keys), layers, H * K, D),
        random_weight(next(keys), layers, D, 2 * model.inner),
        random_weight(next(keys), layers, model.inner, D),
        vector(D, 1, 0.1),
        vector(D, 1, 0.1),
        qkv_bias,
        key_bias,
        *((vector(K, 1, 0.1), vector(K, 1, 0.1)) if model.qk_norm else (None, None)),
    )
    shape = (layers, batch, G, length, K)
    if quantized:
        units = [jax.random.bits(next(keys), shape, jnp.uint8) for _ in range(2)]
        facts = [
            jax.random.uniform(next(keys), shape[:-1], jnp.float32, *limits).astype(jnp.float16)
            for limits in ((0.005, 0.02), (-2.0, -0.5)) * 2
        ]
        kv = KVArrays(*units, *facts)
    else:
        kv = KVArrays(*(jax.random.normal(next(keys), shape, jnp.bfloat16) for _ in range(2)))
    angle = jnp.arange(length)[:, None] * 1e4 ** (-jnp.arange(K // 2) / (K // 2))
    tables = jnp.cos(angle)[None].astype(jnp.float32), jnp.sin(angle)[None].astype(jnp.float32)
    return jax.random.normal(next(keys), (batch, D)).astype(jnp.bfloat16) + jnp.bfloat16(0.1), weights, kv, tables


def reference(model: Model, x, weights: op.LayerWeights, kv: KVArrays, lengths, tables):
    """A float32 step on dequantized weights: (hidden, new keys or units of all layers)."""
    dot = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    B, H, G = x.shape[0], model.heads, model.kv_heads
    S = kv.keys.shape[3]
    cos, sin = (table[0, lengths - 1][:, None] for table in tables)

    def norm(x, scale):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale.astype(jnp.float32)

    def rotate(x, cos, sin):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def quantize(x):
        low, high = x.min(-1), x.max(-1)
        scale, low = ((high - low) / 255).astype(jnp.float16), low.astype(jnp.float16)
        units = jnp.round((x - low.astype(jnp.float32)[..., None]) / scale.astype(jnp.float32)[..., None])
        return jnp.clip(units, 0, 255).astype(jnp.uint8), scale, low

    def put(array, new):
        return jax.vmap(lambda a, n, at: a.at[:, at].set(n))(array, new, lengths - 1)

    x, written = x.astype(jnp.float32), []
    for layer in range(weights.attention_norm.shape[0]):

        def full(name, layer=layer):
            return mosaic_gpu.dequantize(getattr(weights, name), layer)

        joint = dot("bi,io->bo", norm(x, weights.attention_norm[layer]), full("qkv"))
        if weights.qkv_bias is not None:
            joint += weights.qkv_bias[layer].astype(jnp.float32)
        query, key, value = jnp.split(joint, [H * K, (H + G) * K], -1)
        query, key, value = query.reshape(B, H, K), key.reshape(B, G, K), value.reshape(B, G, K)
        if weights.query_norm is not None:
            query, key = norm(query, weights.query_norm[layer]), norm(key, weights.key_norm[layer])
        bias = None if weights.key_bias is None else weights.key_bias[layer].astype(jnp.float32).reshape(G, K)
        if bias is not None and not kv.quantized:
            key = key + bias
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if kv.quantized:
            (ku, ks, km), (vu, vs, vm) = quantize(key), quantize(value)
            names = ("keys", "values", "key_scales", "key_minimums", "value_scales", "value_minimums")
            c = {n: put(getattr(kv, n)[layer], new) for n, new in zip(names, (ku, vu, ks, km, vs, vm), strict=True)}
            f32 = {n: a.astype(jnp.float32) for n, a in c.items()}
            keys = f32["key_minimums"][..., None] + f32["key_scales"][..., None] * f32["keys"]
            values = f32["value_minimums"][..., None] + f32["value_scales"][..., None] * f32["values"]
            if bias is not None:
                keys += rotate(bias[:, None], tables[0], tables[1])
            written.append(ku)
        else:
            keys = put(kv.keys[layer].astype(jnp.float32), key)
            values = put(kv.values[layer].astype(jnp.float32), value)
            written.append(key)
        logits = dot("bgqk,bgsk->bgqs", query.reshape(B, G, H // G, K), keys) * K**-0.5
        logits = jnp.where(jnp.arange(S) < lengths[:, None, None, None], logits, -jnp.inf)
        attended = dot("bgqs,bgsk->bgqk", jax.nn.softmax(logits), values).reshape(B, H * K)
        x = x + dot("bi,io->bo", attended, full("output"))
        gate, up = jnp.split(dot("bi,io->bo", norm(x, weights.mlp_norm[layer]), full("gate_up")), 2, -1)
        x = x + dot("bi,io->bo", jax.nn.silu(gate) * up, full("down"))
    return x, jnp.stack(written)


def step(chip: str, options: dict, x, weights, kv, start, tables):
    """The kernel."""
    return op.run(x, weights, kv, start, tables, chip=chip, epsilon=1e-6, plan_options=options)


def check(
    name: str, layers: int, batch: int, length: int, quantized: bool, options: dict, chip: str, launches: int
) -> None:
    """Prints the error against the reference, and how many of `launches` launches gave other bits than the first."""
    model = MODELS[name]
    x, weights, kv, tables = make(model, layers, batch, length, quantized)
    lengths = jnp.asarray(np.random.default_rng(0).integers(1, length + 1, batch), jnp.int32).at[0].set(length - 5)
    want, written = jax.jit(functools.partial(reference, model))(x, weights, kv, lengths, tables)
    if (reason := op.unsupported(op.shape_of(x, weights, kv), chip)) is not None:
        print(f"check {name} L{layers} B{batch} S{length}: not taken, {reason}", flush=True)
        return
    run = jax.jit(functools.partial(step, chip, options))
    arguments = x, weights, kv, lengths - 1, op.Tables.of(*tables)
    first, cache = run(*arguments)
    differs = jax.jit(lambda count, a, b: count + jnp.any(a != b))
    count = jnp.int32(0)
    for _ in range(launches):
        count = differs(count, first, run(*arguments)[0])
    got = np.asarray(first, np.float64)
    error = np.linalg.norm(got - np.asarray(want)) / np.linalg.norm(np.asarray(want))
    new = jnp.stack([cache.keys[:, b, :, lengths[b] - 1] for b in range(batch)], 1)
    apart = np.abs(np.asarray(new, np.float64) - np.asarray(written, np.float64)).max()
    print(
        f"check {name} L{layers} B{batch} S{length} {'int8' if quantized else 'bf16'} {options}: error {error:.2e}, "
        f"{int(count)} of {launches} launches differ, new keys apart at most {apart:.2f}",
        flush=True,
    )


seconds = functools.partial(timing.seconds, few=2, many=10, repeats=5)


def bytes_of(model: Model, weights, batch: int, length: int, quantized: bool) -> float:
    """Bytes that a layer must read."""
    tensors = (weights.qkv, weights.output, weights.gate_up, weights.down)
    total = sum(t.packed.nbytes + t.scales.nbytes for t in tensors) / weights.attention_norm.shape[0]
    return total + batch * length * model.kv_heads * (2 * K + 8 if quantized else 4 * K)


def measure(name: str, batch: int, length: int, quantized: bool, variants, phases: bool, chip: str, copy: float):
    """Times variants of one model; yields records."""
    model = MODELS[name]
    layers = min(model.layers, max(8, int(4e9 // (model.hidden * (4 * model.hidden + 3 * model.inner) / 2))))
    x, weights, kv, tables = make(model, layers, batch, length, quantized)
    start, tables = jnp.full(batch, length - 1, jnp.int32), op.Tables.of(*tables)
    head = jax.random.normal(jax.random.key(9), (model.vocabulary, model.hidden), jnp.bfloat16)
    multiply = jax.jit(lambda h, x: jnp.einsum("vd,bd->bv", h, x, preferred_element_type=jnp.float32))
    head_us = seconds(lambda: multiply(head, x)) * 1e6
    layer_bytes = bytes_of(model, weights, batch, length, quantized)
    names = ("qkv", "cache", "output", "gate_up", "down")
    cases = [dict(v) for v in variants]
    if phases:
        cases += [dict(variants[0], skip=(skip,)) for skip in names]
        cases += [dict(variants[0], skip=tuple(n for n in names if n != only)) for only in names]
    for options in cases:
        options["skip"] = tuple(options.get("skip", ()))
        try:
            run = jax.jit(functools.partial(step, chip, options), donate_argnums=2)
            cache = jax.tree.map(jnp.copy, kv)
            hidden = x

            def once(run=run):
                nonlocal cache, hidden
                hidden, cache = run(x, weights, cache, start, tables)
                return hidden

            us = seconds(once) * 1e6 / layers
        except Exception as error:  # a variant that cannot run is reported, and the others still run
            print(f"failed {name} {options}: {error!r}"[:400], flush=True)
            continue
        token = us * model.layers + head_us
        record = dict(model=name, batch=batch, context=length, cache="int8" if quantized else "bfloat16",
                      options=options, us_layer=round(us, 2), gb_s=round(layer_bytes / us / 1e3),
                      of_copy=round(layer_bytes / us / 1e3 / copy, 3), lm_head_us=round(head_us, 1),
                      tok_s=round(batch * 1e6 / token, 1))  # fmt: skip
        print(json.dumps(record), flush=True)
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["qwen-7b"], choices=MODELS)
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--caches", nargs="*", default=["int8"], choices=("int8", "bfloat16"))
    parser.add_argument("--variants", default="[{}]", help="JSON list of plan options")
    parser.add_argument("--phases", action="store_true")
    parser.add_argument("--check", nargs="*", help="model:layers:batch:length:cache to compare, before any timing")
    parser.add_argument("--launches", type=int, default=100, help="launches of each check")
    parser.add_argument("--output", help="write records here as JSON")
    options = parser.parse_args()
    chip, variants, records = jax.devices()[0].device_kind, json.loads(options.variants), []
    for row in options.check or ():
        name, layers, batch, length, cache = row.split(":")
        for variant in variants:
            check(name, int(layers), int(batch), int(length), cache == "int8", variant, chip, options.launches)
    if options.models:
        big = jnp.ones(2**28, jnp.float32)
        add = jax.jit(lambda x: x + 1)
        copy = 2 * big.nbytes / seconds(lambda: add(big)) / 1e9
        del big
        print(f"{chip}, JAX {jax.__version__}, copy {copy:.0f} GB/s", flush=True)
    for name in options.models:
        for cache in options.caches:
            for batch in options.batch:
                records += measure(name, batch, options.context, cache == "int8", variants, options.phases, chip, copy)
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Times decode attention of one layer over the 8-bit and the 16-bit cache: µs, GB/s, share of a copy's bandwidth.

Run on a GPU: `python benchmarks/kv_attention.py [--models qwen-7b] [--batches 8 32] [--contexts 2048] [--out FILE]`.
Each row chains one call a layer over a stacked cache larger than the L2 cache, the output of one being the query of
the next; time a call = (long run − short run) / calls, medians. `floor` is the bytes read over the copy's bandwidth,
measured in the same run.
"""

import argparse
import concurrent.futures
import datetime
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from pallas_kernels.kv_attention import mosaic_gpu, shapes, xla  # noqa: E402
from pallas_kernels.kv_attention.tensor import KVArrays  # noqa: E402
from qwen_jax.bench.timing import copy_bandwidth, seconds  # noqa: E402

ROTATE_BYTES = 256 * 2**20  # a chain reads more than this: five times the L2 cache
MOST_BYTES = 30 * 2**30


def random_cache(shape, quantized: bool) -> KVArrays:
    """A cache of random contents."""
    keys = jax.random.split(jax.random.key(0), 6)
    if not quantized:
        return KVArrays(*(jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2]))
    units = [jax.random.bits(key, shape, jnp.uint8) for key in keys[:2]]
    scales = [
        jax.random.uniform(key, shape[:-1], jnp.float16, *limits)
        for key, limits in zip(keys[2:], ((0.002, 0.02), (-2.0, -0.5)) * 2, strict=True)
    ]
    return KVArrays(*units, *scales)


class Row:
    """One line of the table."""

    def __init__(self, model: str, batch: int, context: int, cache: str, kernel: str):
        self.facts = dict(model=model, batch=batch, context=context, cache=cache, kernel=kernel)
        self.dims = dims = shapes.MODELS[model]
        self.quantized = cache == "int8"
        self.bytes = shapes.bytes_read(dims, batch * context, self.quantized)
        self.layers = min(max(2, -(-ROTATE_BYTES // self.bytes)), 16)
        self.shape = (self.layers, batch, dims.kv_heads, context, dims.head_dim)
        self.kernel = {"mosaic_gpu": mosaic_gpu, "xla": xla}[kernel]

    def compile(self):
        """Compiles the chain, and the making of its data."""
        dims, (_, B, G, S, K) = self.dims, self.shape
        biased = self.quantized and dims.key_bias

        def chain(query, kv, lengths, bias, rotary):
            for layer in range(self.layers):
                query = self.kernel.attend_decode(
                    query, kv, layer, lengths, scale=K**-0.5, key_bias_GK=bias, key_rotary=rotary,
                    sliding_window=None, active_length=None,
                )  # fmt: skip
            return query

        def make():
            query = jax.random.normal(jax.random.key(1), (B, dims.heads, K), jnp.bfloat16)
            bias = rotary = None
            if biased:
                bias = jax.random.normal(jax.random.key(2), (G, K), jnp.bfloat16) * jnp.bfloat16(10)
                angle = jnp.arange(S)[:, None] * 1e4 ** (-jnp.arange(K // 2) / (K // 2))
                rotary = (jnp.cos(angle)[None].astype(jnp.float32), jnp.sin(angle)[None].astype(jnp.float32))
            return query, random_cache(self.shape, self.quantized), jnp.full(B, S, jnp.int32), bias, rotary

        begin = time.perf_counter()
        self.make = jax.jit(make).lower().compile()
        self.chain = jax.jit(chain).lower(*jax.eval_shape(make)).compile()
        self.facts["compile_s"] = round(time.perf_counter() - begin, 1)
        return self

    def measure(self, copy: float) -> dict:
        """Runs it: facts, µs, GB/s, floor and share of the copy's bandwidth."""
        data = jax.block_until_ready(self.make())
        took = seconds(lambda: self.chain(*data)) / self.layers
        return self.facts | dict(
            us=round(took * 1e6, 1),
            gb_s=round(self.bytes / took / 1e9),
            floor_us=round(self.bytes / copy / 1e3, 1),
            of_copy=round(self.bytes / took / 1e9 / copy, 3),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=shapes.BENCHED, choices=shapes.MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=shapes.BATCHES)
    parser.add_argument("--contexts", nargs="+", type=int, default=shapes.CONTEXTS)
    parser.add_argument("--caches", nargs="+", default=("int8", "bfloat16"), choices=("int8", "bfloat16"))
    parser.add_argument("--kernels", nargs="+", default=("mosaic_gpu",), choices=("mosaic_gpu", "xla"))
    parser.add_argument("--rows", help="model:batch:context:cache:kernel, comma-separated, instead of a grid")
    parser.add_argument("--out", help="write JSON here")
    options = parser.parse_args()
    if options.rows:
        cells = [row.split(":") for row in options.rows.split(",")]
        cells = [(model, int(batch), int(context), cache, kernel) for model, batch, context, cache, kernel in cells]
    else:
        cells = [
            (model, batch, context, cache, kernel)
            for model in options.models
            for batch in options.batches
            for context in options.contexts
            for cache in options.caches
            for kernel in options.kernels
        ]
    rows = [Row(*cell) for cell in cells]
    rows = [row for row in rows if row.bytes * row.layers < MOST_BYTES]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        compiled = [pool.submit(row.compile) for row in rows]
    copy = copy_bandwidth() / 1e9
    device = jax.devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}, copy {copy:.0f} GB/s")
    heading = ("model", "batch", "context", "cache", "kernel", "us", "gb_s", "floor_us", "of_copy")
    print("  ".join(f"{name:>10}" for name in heading))
    results = []
    for row in compiled:
        try:
            result = row.result().measure(copy)
        except Exception as error:  # a row that cannot run is reported, not hidden, and the others still run
            print(f"failed: {error!r}"[:300])
            continue
        results.append(result)
        print("  ".join(f"{result[name]!s:>10}" for name in heading), flush=True)
    if options.out:
        record = dict(
            date=datetime.date.today().isoformat(),
            device=device.device_kind,
            jax=jax.__version__,
            copy_gb_s=round(copy),
            rows=results,
        )
        pathlib.Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

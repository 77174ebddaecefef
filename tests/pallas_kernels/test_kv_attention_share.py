"""A cache cut into shares along its length, as several devices hold it: each kernel's shares, merged, are the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_attention import KVArrays, attend_decode, choose, mosaic_gpu_decode, mosaic_tpu, reference, xla
from pallas_kernels.kv_attention.mosaic_gpu_fragments import TileShape
from pallas_kernels.kv_attention.mosaic_gpu_schedule import Schedule
from pallas_kernels.kv_attention.op import AttentionShape
from pallas_kernels.kv_attention.share import hide_empty, merge_slices, turned_back
from tests.pallas_kernels import test_kv_attention_mosaic_gpu as gpu

B, G, H, S, K = 3, 2, 6, 288, 64
LENGTHS = np.array([288, 1, 131], np.int32)  # of the second slot the second share has nothing


def whole_cache(quantized: bool, dtype) -> KVArrays:
    random = np.random.default_rng(1)
    keys, values = (random.normal(0.3, 1, (2, B, G, S, K)).astype(np.float32) for _ in range(2))
    if not quantized:
        return KVArrays(*(np.asarray(jnp.asarray(array, dtype)) for array in (keys, values)))
    (k, *k_parts), (v, *v_parts) = (reference.quantize(array) for array in (keys, values))
    return KVArrays(k, v, *k_parts, *v_parts)


def run(kernel, function, *arguments, **options):
    """Compiled or interpreted, float16 as the kernel takes it."""
    bits = kernel is mosaic_tpu

    def there(a):
        return jnp.asarray(a.view(np.int16) if bits and a.dtype == np.float16 else a)

    arguments = jax.tree.map(there, arguments)
    if not bits:
        return function(*arguments, **options)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        return jax.jit(functools.partial(function, **options))(*arguments)


@pytest.mark.parametrize("kernel, quantized, bias, window", [
    (xla, False, False, 100),
    (xla, True, True, None),
    pytest.param(mosaic_tpu, False, False, None, marks=pytest.mark.slow),
    (mosaic_tpu, True, True, None),
])  # fmt: skip
def test_shares_merge_to_the_whole(monkeypatch, kernel, quantized, bias, window, n=2):
    monkeypatch.setattr(mosaic_tpu, "BLOCK_BYTES", 1)  # blocks of 128 tokens
    random = np.random.default_rng(2)
    dtype = jnp.float32 if kernel is xla else jnp.bfloat16
    kv, query = whole_cache(quantized, dtype), np.asarray(jnp.asarray(random.normal(size=(B, H, K)), dtype))
    rotary, bias_GK = None, None
    if bias:
        bias_GK = random.normal(0, 3, (G, K)).astype(np.float32)
        bias_GK[:, -2:] = 200, -120
        angle = np.arange(S)[None, :, None] * 1e4 ** -(np.arange(0, K, 2) / K)
        rotary = tuple(np.asarray(table * 1.2, np.float32) for table in (np.cos(angle), np.sin(angle)))  # YaRN's factor
    want = reference.attend_decode(
        np.asarray(query, np.float64), kv, 1, LENGTHS, scale=K**-0.5, key_bias_GK=bias_GK, key_rotary=rotary,
        sliding_window=window,
    )  # fmt: skip
    parts = []
    for mine in range(n):
        share = jax.tree.map(lambda a, mine=mine: a[:, :, :, mine::n], kv)
        places = [-(-(np.maximum(length, mine) - mine) // n) for length in (LENGTHS, LENGTHS - (window or 0))]
        seen = None if window is None else (places[0] - places[1])[:, None]
        table = None if rotary is None else tuple(array[:, mine::n] for array in rotary)

        def attend(query, kv, layer, lengths, bias_GK, table, seen=seen):
            more = dict(key_bias_GK=bias_GK, key_rotary=table, sliding_window=seen, share=True)
            return kernel.attend_decode(query, kv, layer, lengths, scale=K**-0.5, active_length=None, **more)

        attended, log_total = run(kernel, attend, query, share, np.int32(1), places[0].astype(np.int32), bias_GK, table)
        assert attended.dtype == log_total.dtype == jnp.float32 and np.isfinite(attended).all()
        assert (np.asarray(log_total)[places[0] == 0] < -1e29).all()
        parts.append((attended, log_total))
    got = merged(parts)
    limit = 1e-5 if kernel is xla else 4e-3
    for slot in range(B):
        assert np.linalg.norm(got[slot] - want[slot]) < limit * np.linalg.norm(want[slot])


@pytest.mark.parametrize("cache, queries, workers, bias_slots", [("uint8", 2, 5, 2), ("bfloat16", 3, 3, 0)])
def test_shares_of_the_gpu_kernel(cache, queries, workers, bias_slots, n=2):
    """Its structure under the interpreter, the arithmetic a portable twin: slices of every item, merged by XLA."""
    random = np.random.default_rng(workers)
    L, B, G, S, K = 2, 2, 2, 256, 32
    H, lengths = G * queries, np.array([201, 1], np.int32)
    kv = gpu.random_cache(random, (L, B, G, S, K), cache)
    query = jnp.asarray(random.normal(size=(B, H, K)), jnp.bfloat16)
    bias_GK, rotary = None, None
    if bias_slots:
        bias_GK = jnp.asarray(random.normal(size=(G, K)) * 10, jnp.float32)
        rotary = gpu.random_rotary(random, bias_slots, S, K, factor=1.3)
    shape = TileShape(K, queries, 1, cache == "uint8", "bfloat16", 0.2, "float32" if bias_slots else None)
    kernel = mosaic_gpu_decode.build(
        shape, mosaic_gpu_decode.Plan(1, 2, workers), (B, G, S // n), None, bias_slots,
        arithmetic=gpu.portable.PortableMerge(shape), interpret=plgpu.InterpretGPUParams(detect_races=True),
        sliced=True,
    )  # fmt: skip
    parts = []
    for mine in range(n):
        part = jax.tree.map(lambda a, mine=mine: a[:, :, :, mine::n], kv)
        local = jnp.asarray(np.maximum(-(-(lengths - mine) // n), 0), jnp.int32)
        bias = ()
        if rotary is not None:
            tables = [table[:, mine::n] for table in rotary]
            bias = (bias_GK, *turned_back(*tables, shape.tokens)[:2], *tables)
        scales = tuple(getattr(part, name) for name in mosaic_gpu_decode.SCALES) if cache == "uint8" else ()
        _, partial, statistics = kernel(
            query.reshape(B, G, queries, K), part.keys, part.values, scales, local, [jnp.ones(1, jnp.int32)],
            jnp.zeros(B * G, jnp.int32), bias,
        )  # fmt: skip
        assert not gpu.races_found()
        schedule = Schedule(B, G, S // n, shape.tokens, workers, None)
        found = merge_slices(schedule, local, partial, statistics[..., 0], statistics[..., 1])
        parts.append(hide_empty(found[0].reshape(B, H, K), found[1].reshape(B, H), local))
    want = reference.attend_decode(query, kv, 1, lengths, scale=0.2, key_bias_GK=bias_GK, key_rotary=rotary)
    assert gpu.relative_error(merged(parts), want) < 4e-3
    assert np.asarray(parts[1][1])[1].max() < -1e29  # of a slot of one token the second share has nothing


@pytest.mark.gpu
@pytest.mark.parametrize("cache, queries, biased", [("uint8", 7, True), ("uint8", 1, True), ("bfloat16", 8, False)])
def test_shares_on_a_card(cache, queries, biased, n=3):
    random = np.random.default_rng(queries)
    L, B, G, S, K = 2, 3, 4, 3072, 128
    H, lengths = G * queries, np.array([3072, 1, 1300], np.int32)
    kv = gpu.random_cache(random, (L, B, G, S, K), cache)
    query, options, tables = jnp.asarray(random.normal(size=(B, H, K)), jnp.bfloat16), {}, None
    if biased:
        options["key_bias_GK"] = jnp.asarray(random.normal(size=(G, K)) * 30, jnp.float32)
        tables = gpu.random_rotary(random, B, S, K, factor=1.3)
    want = reference.attend_decode(query, kv, 1, lengths, scale=K**-0.5, key_rotary=tables, **options)
    parts = []
    for mine in range(n):
        part = jax.tree.map(lambda a, mine=mine: a[:, :, :, mine::n], kv)
        local = jnp.asarray(np.maximum(-(-(lengths - mine) // n), 0), jnp.int32)
        if biased:
            options["key_rotary"] = tuple(table[:, mine::n] for table in tables)
        attend = functools.partial(attend_decode, scale=K**-0.5, kernels="mosaic_gpu", share=True, **options)
        parts.append(jax.jit(attend)(query, part, jnp.int32(1), local))
    assert gpu.relative_error(merged(parts), want) < 4e-3


def merged(parts):
    """Attention over all shares, from each one's (attended, log of its denominator)."""
    attended, log_total = (np.stack([np.asarray(part[which], np.float64) for part in parts]) for which in (0, 1))
    weight = np.exp(log_total - log_total.max(0))[..., None]
    return (weight * attended).sum(0) / weight.sum(0)


@pytest.mark.parametrize("kernel, quantized", [(xla, True), (mosaic_tpu, True), (mosaic_tpu, False)])
def test_a_token_of_another_share_is_not_written(kernel, quantized):
    random = np.random.default_rng(3)
    dtype = jnp.float32 if kernel is xla else jnp.bfloat16
    kv = whole_cache(quantized, dtype)
    key, value = (np.asarray(jnp.asarray(random.normal(size=(B, 1, G, K)), dtype)) for _ in range(2))
    start = np.array([-1, 7, -1], np.int32)
    append = functools.partial(kernel.append, share=True)
    got = run(kernel, append, kv, np.int32(1), key, value, start)
    want = reference.append(kv, 1, np.float32(key), np.float32(value), np.maximum(start, 0))
    for old, new, right in zip(*map(jax.tree.leaves, (kv, got, want)), strict=True):
        new = np.asarray(new).view(old.dtype)
        np.testing.assert_array_equal(new[:, ::2], old[:, ::2])
        np.testing.assert_array_equal(new[:, 1], right[:, 1])
        assert (new[:, 1] != old[:, 1]).any()


def test_choice_for_a_share():
    """A kernel that takes no window of each slot says so, and is not chosen."""
    shape = AttentionShape(8, 32, 8, 128, 4096, True, "bfloat16", share=True)
    assert choose(shape, "TPU v5e").name == "mosaic_tpu"
    windowed = AttentionShape(8, 32, 8, 128, 4096, True, "bfloat16", share=True, window=True)
    found = choose(windowed, "TPU v5e")
    assert found.name == "xla" and "differs from slot to slot" in dict(found.refusals)["mosaic_tpu"]
    assert choose(shape, "NVIDIA H100 80GB HBM3").name == "mosaic_gpu"
    found = choose(windowed, "NVIDIA H100 80GB HBM3")
    assert found.name == "xla" and "differs from slot to slot" in dict(found.refusals)["mosaic_gpu"]

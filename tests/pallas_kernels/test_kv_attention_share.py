"""A cache cut into shares along its length, as several devices hold it: each kernel's shares, merged, are the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_attention import KVArrays, choose, mosaic_tpu, reference, xla
from pallas_kernels.kv_attention.op import AttentionShape

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
        parts.append((np.asarray(attended, np.float64), np.asarray(log_total, np.float64)))
    top = np.max([log_total for _, log_total in parts], axis=0)
    weights = [np.exp(log_total - top)[..., None] for _, log_total in parts]
    got = sum(w * attended for w, (attended, _) in zip(weights, parts, strict=True)) / sum(weights)
    limit = 1e-5 if kernel is xla else 4e-3
    for slot in range(B):
        assert np.linalg.norm(got[slot] - want[slot]) < limit * np.linalg.norm(want[slot])


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
    """A kernel that cannot hand out its denominator, or takes no window of each slot, says so and is not chosen."""
    shape = AttentionShape(8, 32, 8, 128, 4096, True, "bfloat16", share=True)
    assert choose(shape, "TPU v5e").name == "mosaic_tpu"
    windowed = AttentionShape(8, 32, 8, 128, 4096, True, "bfloat16", share=True, window=True)
    found = choose(windowed, "TPU v5e")
    assert found.name == "xla" and "differs from slot to slot" in dict(found.refusals)["mosaic_tpu"]
    found = choose(shape, "NVIDIA H100 80GB HBM3")
    assert found.name == "xla" and "denominator" in dict(found.refusals)["mosaic_gpu"]

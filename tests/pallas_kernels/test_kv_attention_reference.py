"""The NumPy reference against properties that hold by definition, and against a second spelling of rotary."""

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.kv_attention import reference
from pallas_kernels.kv_attention.tensor import KVArrays


def empty_cache(L, B, G, S, K, dtype):
    if dtype != np.uint8:
        return KVArrays(np.zeros((L, B, G, S, K), dtype), np.zeros((L, B, G, S, K), dtype))
    scales = [np.zeros((L, B, G, S), np.float16) for _ in range(4)]
    return KVArrays(np.zeros((L, B, G, S, K), dtype), np.zeros((L, B, G, S, K), dtype), *scales)


def test_quantize_is_within_half_a_step():
    random = np.random.default_rng(0)
    x = (
        random.normal(size=(500, 128)) * 10.0 ** random.uniform(-3, 2, (500, 1)) + random.normal(size=(500, 1))
    ).astype(np.float32)
    units, scale, minimum = reference.quantize(x)
    error = np.abs(reference.dequantize(units, scale, minimum) - x)
    # Half a step, and what float16 takes off the range's two ends: there units clip at 0 and 255.
    rounding = np.abs(x).max(-1) * 2.0**-11 + 255 * np.float64(scale) * 2.0**-11 + 2.0**-24 * 256
    assert (error <= (np.float64(scale) / 2 + rounding)[:, None]).all()
    assert (np.abs(error) > np.float64(scale)[:, None] * 0.4).any()


def test_quantize_of_a_constant_gives_units_of_zero():
    units, scale, minimum = reference.quantize(np.full((3, 16), 1.5, np.float32))
    assert not units.any() and not scale.any() and (minimum == 1.5).all()


def test_rotation_is_a_complex_product():
    random = np.random.default_rng(1)
    x, frequencies = random.normal(size=(7, 16)), random.uniform(0, 1, 8)
    cos, sin = reference.rotary_tables(np.arange(7), frequencies)
    turned = (x[:, :8] + 1j * x[:, 8:]) * np.exp(1j * np.arange(7)[:, None] * frequencies)
    np.testing.assert_allclose(
        reference.rotate(x, cos, sin), np.concatenate([turned.real, turned.imag], -1), atol=1e-12
    )


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float32])
def test_attention_over_appended_tokens(dtype):
    """Tokens appended one by one, then attended: equal to softmax over the original float keys, biases included."""
    random = np.random.default_rng(2)
    L, B, G, H, S, K, layer = 2, 2, 2, 6, 9, 16, 1
    lengths = np.array([9, 5], np.int32)
    bias = random.normal(size=(G, K)) * 5
    cos, sin = reference.rotary_tables(np.arange(S), random.uniform(0, 1, (B, K // 2)))
    kv = empty_cache(L, B, G, S, K, dtype)
    plain, value = random.normal(size=(2, B, S, G, K))
    turn = lambda x: reference.rotate(x, cos[:, :, None], sin[:, :, None])  # noqa: E731
    stored = turn(plain) if dtype == np.uint8 else turn(plain + bias)
    for token in range(S):
        kv = reference.append(kv, layer, stored[:, token : token + 1], value[:, token : token + 1], np.full(B, token))
    query = random.normal(size=(B, H, K))
    got = reference.attend_decode(
        query, kv, layer, lengths, scale=0.3, key_bias_GK=bias if dtype == np.uint8 else None, key_rotary=(cos, sin)
    )
    key = turn(plain + bias)
    for slot in range(B):
        for head in range(H):
            logits = np.einsum("sk,k->s", key[slot, : lengths[slot], head // 3], query[slot, head]) * 0.3
            weight = np.exp(logits) / np.exp(logits).sum()
            want = np.einsum("s,sk->k", weight, value[slot, : lengths[slot], head // 3])
            tolerance = {np.uint8: 0.03, ml_dtypes.bfloat16: 0.2, np.float32: 1e-5}[dtype]
            np.testing.assert_allclose(got[slot, head], want, atol=tolerance)
    assert not np.asarray(kv.keys[0], np.float32).any()  # the other layer is untouched


def test_sliding_window_sees_the_newest_tokens():
    random = np.random.default_rng(3)
    keys, values = random.normal(size=(2, 1, 1, 1, 8, 16))
    query = random.normal(size=(1, 1, 16))
    got = reference.attend_decode(query, KVArrays(keys, values), 0, np.array([7]), scale=1.0, sliding_window=3)
    cut = KVArrays(keys[:, :, :, 4:7], values[:, :, :, 4:7])
    np.testing.assert_allclose(got, reference.attend_decode(query, cut, 0, np.array([3]), scale=1.0))

"""Sums whose bits do not depend on their order: scrambled, cut, and against NumPy float64; attention made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import exact_sums
from pallas_kernels.kv_attention import KVArrays, append, attend_decode, attend_prefill, exact, reference
from pallas_kernels.kv_attention.op import AttentionShape, choose

product = jax.jit(exact_sums.product, static_argnums=2)
split_product = jax.jit(exact_sums.split_product, static_argnums=2)
total = jax.jit(exact_sums.total)


def operands(rows, inputs, outputs, spread=0.0):
    """x [rows, inputs] and w [inputs, outputs] with a mean; with `spread` of sizes over so many powers of ten."""
    rng = np.random.default_rng(inputs)
    x, w = rng.normal(0.3, 1, (rows, inputs)), rng.normal(0.01, 0.05, (inputs, outputs))
    x *= 10.0 ** rng.uniform(-spread, spread, x.shape)
    return x.astype(np.float32), w.astype(np.float32)


def error(got, x, w):
    """Against float64, in units of what the terms add up to: what no order of a sum takes away."""
    got = np.asarray(got, np.float64)
    return (np.abs(got - x.astype(np.float64) @ w) / (np.abs(x).astype(np.float64) @ np.abs(w))).max()


@pytest.mark.parametrize("inputs, unit, spread", [(128, 128, 0), (4096, 128, 1), (1100, 100, 2), (7, 16, 3)])
def test_as_exact_as_a_float32_dot(inputs, unit, spread):
    x, w = operands(9, inputs, 24, spread)
    got, split = product(x, w, unit), total(split_product(x, w, unit))
    one_by_one = np.zeros((9, 24), np.float32)
    for i in range(inputs):
        one_by_one += x[:, i : i + 1] * w[i]
    limit = max(2**-23, error(one_by_one, x, w))
    assert error(got, x, w) < limit and error(split, x, w) < limit
    w[inputs // 2] *= np.float32(1 + 2**-10)  # it can fail
    assert error(product(x, w, unit), x, operands(9, inputs, 24, spread)[1]) > limit


@pytest.mark.parametrize("unit", [8, 31, 32, 48, 100, 128])
def test_sums_within_a_unit_are_exact(unit):
    """Terms all of one sign and as large as slices allow: their order still changes no bit."""
    rng = np.random.default_rng(unit)
    x, w = rng.uniform(0.99, 1, (5, unit)).astype(np.float32), rng.uniform(0.99, 1, (unit, 6)).astype(np.float32)
    want = np.asarray(product(x, w, unit))
    for _ in range(10):
        order = rng.permutation(unit)
        np.testing.assert_array_equal(product(x[:, order], w[order], unit), want)
    plain = {np.asarray(x[:, order] @ w[order]).tobytes() for order in (rng.permutation(unit) for _ in range(50))}
    assert unit < 16 or len(plain) > 1  # NumPy's own do depend on it


def test_columns_and_rows_of_x_may_be_cut_anywhere():
    x, w = operands(23, 320, 40)
    want = np.asarray(product(x, w, 32))
    for columns in (slice(0, 1), slice(5, 12), slice(3, 40)):
        for rows in (slice(2, 3), slice(0, 5), slice(0, 23)):
            np.testing.assert_array_equal(product(x[rows], w[:, columns], 32), want[rows, columns])


@pytest.mark.parametrize("devices", [2, 5])
def test_units_may_lie_anywhere(devices):
    """Units dealt to devices in scrambled order, some with padding, and the devices' digits added in any order."""
    x, w = operands(3, 640, 17, spread=2)
    rng, want = np.random.default_rng(devices), np.asarray(total(split_product(x, w, 32)))
    for _ in range(5):
        shares = []
        for units in np.array_split(rng.permutation(20), devices):
            rows = np.concatenate([np.arange(unit * 32, unit * 32 + 32) for unit in units])
            x_part = np.pad(x[:, rows], ((0, 0), (0, 64)), constant_values=5)
            shares.append(np.asarray(split_product(x_part, np.pad(w[rows], ((0, 64), (0, 0))), 32)))
        digits = functools.reduce(np.add, [shares[place] for place in rng.permutation(devices)])
        np.testing.assert_array_equal(total(digits), want)


def test_a_sum_that_cancels():
    """What is left of 10^5 − 10^5 is found to its own last bit, and its sign does not matter."""
    for small in (3e-6, -3e-6, 0.0):
        x = np.array([[1e5, small, -1e5]], np.float32)
        got = total(split_product(x, np.ones((3, 1), np.float32), 1))
        np.testing.assert_allclose(got, np.float32(small), rtol=2**-23, atol=2**-42)


def test_a_number_has_many_digits():
    """The same number as sums of different shares may leave it: digits carried over, and halves to either side."""
    rng = np.random.default_rng(0)
    digits = rng.integers(-(2**13), 2**13, (4, 5000)).astype(np.float32)
    digits[:2, :3000], digits[2, :2000] = 0, 2**13
    other = digits.copy()
    for place in (3, 2, 1):
        carried = rng.integers(-3, 4, 5000)
        other[place] -= carried * 2**14
        other[place - 1] += carried
    np.testing.assert_array_equal(total(digits), total(other))
    want = (digits.astype(np.float64) * 2.0 ** -np.array([0, 14, 28, 42])[:, None]).sum(0)
    np.testing.assert_allclose(total(digits), want, rtol=2**-23)


def test_zeros_and_what_is_no_number():
    x, w = operands(4, 64, 8)
    x[1], x[2, 3], x[3, 5] = 0, np.nan, np.inf
    for got in (product(x, w, 32), total(split_product(x, w, 32))):
        assert not np.asarray(got)[1].any() and np.isfinite(np.asarray(got)[0]).all()
        assert np.isnan(np.asarray(got)[2:]).all()
    tiny = np.full((1, 64), 1e-41, np.float32)  # subnormal
    assert np.isfinite(np.asarray(product(tiny, w, 32))).all()


def test_products_are_rounded_before_they_are_added():
    """Compiled without care the two are joined into one instruction in some programs."""
    rng = np.random.default_rng(0)
    a, b, c, d = rng.normal(size=(4, 7, 1003)).astype(np.float32)
    for got, want in zip(jax.jit(exact_sums.turn)(a, b, c, d), (a * c - b * d, b * c + a * d), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(jax.jit(exact_sums.scaled)(a, b, c), a * b + c)


# -- attention ---------------------------------------------------------------------------------------------------------

B, G, H, S, K = 3, 4, 8, 40, 32
LENGTHS = np.array([40, 1, 23], np.int32)


def part(array, slots, heads, axis):
    """Some slots and key/value heads (or their queries), as a device of a mesh holds them."""
    return jnp.asarray(np.take(np.asarray(array)[slots], heads, axis=axis))


@pytest.mark.parametrize("quantized, window", [(False, 9), (True, None)])
def test_attention_over_a_cache(quantized, window):
    """Against float64, and the same bits of a head whichever slots and heads lie beside it."""
    rng = np.random.default_rng(3)
    key, value = rng.normal(0.3, 1, (2, B, S, G, K)).astype(np.float32)
    query, bias = rng.normal(size=(B, H, K)).astype(np.float32), rng.normal(0, 3, (G, K)).astype(np.float32)
    angle = np.arange(S)[None, :, None] * 1e4 ** -(np.arange(0, K, 2) / K)
    rotary = tuple(np.asarray(table, np.float32) for table in (np.cos(angle), np.sin(angle)))

    @functools.partial(jax.jit, static_argnames="slots")
    def run(key, value, query, lengths, bias, slots):
        heads = key.shape[2]
        shape, dtype = (1, slots, heads, S, K), jnp.uint8 if quantized else jnp.float32
        scales = [jnp.zeros(shape[:-1], jnp.float16) for _ in range(4)] if quantized else []
        kv = KVArrays(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)
        start = jnp.zeros(slots, jnp.int32)
        kv = append(kv, 0, key, value, start, heads=query.shape[1], kernels="exact")
        more = dict(key_bias_GK=bias, key_rotary=rotary) if quantized else {}
        return kv, attend_decode(query, kv, 0, lengths, scale=0.2, sliding_window=window, kernels="exact", **more)

    kv, got = run(key, value, query, LENGTHS, bias, B)
    more = dict(key_bias_GK=bias, key_rotary=rotary) if quantized else {}
    want = reference.attend_decode(query, jax.device_get(kv), 0, LENGTHS, scale=0.2, sliding_window=window, **more)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for slots, heads in (([2], [1, 2]), ([0, 2], [3])):
        queries = [2 * head + place for head in heads for place in (0, 1)]
        new = part(key, slots, heads, 2), part(value, slots, heads, 2), part(query, slots, queries, 1)
        alone, attended = run(*new, LENGTHS[slots], bias[heads], len(slots))
        np.testing.assert_array_equal(attended, np.asarray(got)[slots][:, queries])
        for ours, whole in zip(jax.tree.leaves(alone), jax.tree.leaves(kv), strict=True):
            np.testing.assert_array_equal(ours, np.asarray(whole)[:, slots][:, :, heads])


@pytest.mark.parametrize("window", [None, 9])
def test_attention_within_a_prompt(monkeypatch, window):
    monkeypatch.setattr(exact, "QUERY_BLOCK", 8)
    rng = np.random.default_rng(4)
    query, key, value = (rng.normal(0.2, 1, (B, S, heads, K)).astype(np.float32) for heads in (H, G, G))
    run = jax.jit(functools.partial(attend_prefill, scale=0.2, sliding_window=window, kernels="exact"))
    got = run(query, key, value, LENGTHS)
    logits = np.einsum("BTGQK,BSGK->BGQTS", query.reshape(B, S, G, H // G, K), key, dtype=np.float64) * 0.2
    place = np.arange(S)
    seen = (place <= place[:, None]) & (place > place[:, None] - (window or S))
    weight = np.exp(np.where(seen, logits - logits.max(-1, keepdims=True), -np.inf))
    want = np.einsum("BGQTS,BSGK->BTGQK", weight / weight.sum(-1, keepdims=True), value).reshape(B, S, H, K)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for slots, heads in (([2], [1, 2]), ([0, 2], [3])):
        queries = [2 * head + place for head in heads for place in (0, 1)]
        new = part(query, slots, queries, 2), part(key, slots, heads, 2), part(value, slots, heads, 2)
        np.testing.assert_array_equal(run(*new, LENGTHS[slots]), np.asarray(got)[slots][:, :, queries])


def test_only_where_it_is_named():
    shape = AttentionShape(2, 4, 2, 32, 64, True, "float32")
    assert choose(shape, "cpu").name == "xla" and choose(shape, "cpu", "exact").name == "exact"
    with pytest.raises(ValueError, match="shares of a cache are merged in an order of their own"):
        choose(AttentionShape(2, 4, 2, 32, 64, True, "float32", share=True), "cpu", "exact")

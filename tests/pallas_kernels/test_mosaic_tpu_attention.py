"""Decode attention and append for TPU under the TPU interpreter, against NumPy float64 and the float16 of NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.chip import compiling_for
from pallas_kernels.kv_attention import (
    KVArrays,
    attend_prefill,
    choose,
    mosaic_tpu,
    mosaic_tpu_prefill,
    reference,
    scale_dtype,
    xla,
)
from pallas_kernels.kv_attention.op import AttentionShape
from tests.pallas_kernels.tpu_traffic import count_bytes

LIMIT = 4e-3


def on_tpu(kv: KVArrays) -> KVArrays:
    """The cache as it is kept there: float16 as int16."""
    return jax.tree.map(lambda a: jnp.asarray(a.view(np.int16) if a.dtype == np.float16 else a), kv)


def back(kv: KVArrays) -> KVArrays:
    return jax.tree.map(lambda a: np.asarray(a).view(np.float16) if a.dtype == jnp.int16 else np.asarray(a), kv)


def filled(shape, quantized: bool, lengths=None) -> KVArrays:
    """Random keys and values; past a slot's length what no one may look at: NaN, and the largest numbers."""
    rng = np.random.default_rng(1)
    keys, values = (rng.normal(0.3, 1, shape).astype(np.float32) for _ in range(2))
    unwritten = None
    if lengths is not None:
        unwritten = np.arange(shape[3]) >= np.asarray(lengths)[:, None]  # [B, S]
        unwritten = np.broadcast_to(unwritten[None, :, None], shape[:-1])
    if not quantized:
        kv = KVArrays(*(np.array(jnp.asarray(array, jnp.bfloat16)) for array in (keys, values)))
    else:
        kv = KVArrays(*(reference.quantize(array)[0] for array in (keys, values)))
        parts = [part for array in (keys, values) for part in reference.quantize(array)[1:]]
        kv = KVArrays(kv.keys, kv.values, *parts)
    if unwritten is not None:
        for leaf in jax.tree.leaves(kv):
            leaf[unwritten] = 255 if leaf.dtype == np.uint8 else np.nan
    return kv


def interpreted(function, *arguments, **options):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        return jax.jit(lambda *arrays: function(*arrays, **options))(*arguments)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim", "quantized", "bias", "window", "slot_tables"),
    [
        (4, 4, 192, 64, False, False, None, False),
        (14, 2, 300, 128, True, True, None, False),  # 7 queries a head, padded; a last block that is not whole
        (4, 4, 300, 64, True, True, 140, True),  # dynamic NTK: tables of each slot
        (8, 1, 300, 128, False, False, 100, False),
        (8, 8, 256, 128, True, False, 1, False),
    ],
)
def test_decode(monkeypatch, heads, kv_heads, length, head_dim, quantized, bias, window, slot_tables):
    monkeypatch.setattr(mosaic_tpu, "BLOCK_BYTES", 1)  # blocks of 128 tokens: several of them
    rng = np.random.default_rng(2)
    lengths = np.array([length, 1, 131], np.int32)
    kv = filled((2, 3, kv_heads, length, head_dim), quantized, lengths)
    query = jnp.asarray(rng.normal(0, 1, (3, heads, head_dim)), jnp.bfloat16)
    options = {"scale": head_dim**-0.5, "key_bias_GK": None, "key_rotary": None, "sliding_window": window}
    if bias:
        key_bias = rng.normal(0, 3, (kv_heads, head_dim)).astype(np.float32)
        key_bias[:, -3:] = 300, 180, -120  # as Qwen2.5-7B's: rounded to bfloat16 it would be off by 1
        base = 1e4 * np.array([[1], [3], [7]]) if slot_tables else np.array([[1e6]])
        frequency = base ** -(np.arange(0, head_dim, 2) / head_dim)
        angle = np.arange(length)[None, :, None] * frequency[:, None]
        factor = np.float32(1.2)  # YaRN's
        options["key_bias_GK"] = key_bias
        options["key_rotary"] = (np.cos(angle) * factor, np.sin(angle) * factor)
    want = reference.attend_decode(np.asarray(query, np.float64), kv, 1, lengths, **options)
    options = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32) if isinstance(a, np.ndarray) else a, options)
    got = interpreted(
        mosaic_tpu.attend_decode, query, on_tpu(kv), jnp.int32(1), jnp.asarray(lengths), active_length=None, **options
    )
    got = np.asarray(got, np.float64)
    for slot in range(3):
        assert np.linalg.norm(got[slot] - want[slot]) < LIMIT * np.linalg.norm(want[slot])
    # One token fewer is seen where the length is short, and the bias where there is one.
    if bias:
        options |= {"key_bias_GK": None, "key_rotary": None}
        without = reference.attend_decode(np.asarray(query, np.float64), kv, 1, lengths, **options)
        assert np.linalg.norm(got - without) > 10 * LIMIT * np.linalg.norm(want)


@pytest.mark.parametrize("tokens", [1, 130])
@pytest.mark.parametrize("quantized", [True, False])
def test_append(tokens, quantized):
    """Bit for bit what NumPy rounds, nothing else touched; the first, the last and an odd place."""
    rng = np.random.default_rng(3)
    kv = filled((2, 3, 2, 256, 64), quantized)
    key, value = (jnp.asarray(rng.normal(mean, 1, (3, tokens, 2, 64)), jnp.bfloat16) for mean in (0, 5))
    value = value.at[1, 0].set(2.5)  # a range of zero
    start = np.array([0, 256 - tokens, 77], np.int32)
    want = reference.append(kv, 1, np.asarray(key, np.float32), np.asarray(value, np.float32), start)
    got = back(interpreted(mosaic_tpu.append, on_tpu(kv), jnp.int32(1), key, value, jnp.asarray(start)))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for field in dataclasses.fields(KVArrays):
        if getattr(want, field.name) is not None:
            np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name), field.name)


def test_xla_reads_and_writes_float16_kept_as_bits():
    kv, lengths = filled((2, 2, 2, 64, 32), True), jnp.array([64, 9], jnp.int32)
    query = jnp.asarray(np.random.default_rng(4).normal(0, 1, (2, 4, 32)), jnp.float32)
    options = {"scale": 0.2, "key_bias_GK": None, "key_rotary": None, "sliding_window": None, "active_length": None}
    plain = jax.tree.map(jnp.asarray, kv)
    np.testing.assert_array_equal(
        xla.attend_decode(query, on_tpu(kv), 1, lengths, **options),
        xla.attend_decode(query, plain, 1, lengths, **options),
    )
    new = jnp.ones((2, 1, 2, 32), jnp.float32) * jnp.arange(32, dtype=jnp.float32)
    for got, want in zip(
        jax.tree.leaves(back(xla.append(on_tpu(kv), 0, new, new, lengths - 1))),
        jax.tree.leaves(xla.append(plain, 0, new, new, lengths - 1)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("window", [None, 100])
def test_prefill(window):
    """Two rows of a batch, the second shorter; what stands behind its length is seen by no valid query."""
    rng = np.random.default_rng(6)
    T, lengths = 256, np.array([256, 130], np.int32)
    query, key, value = (jnp.asarray(rng.normal(0.2, 1, (2, T, heads, 128)), jnp.bfloat16) for heads in (4, 2, 2))
    with compiling_for("TPU v5 lite"):
        got = interpreted(
            attend_prefill, query, key, value, jnp.asarray(lengths), scale=128**-0.5, sliding_window=window
        )
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    logits = np.einsum("BTGQK,BSGK->BGQTS", query.reshape(2, T, 2, 2, 128), key) * 128**-0.5
    place = np.arange(T)
    seen = place <= place[:, None]
    if window is not None:
        seen &= place > place[:, None] - window
    weight = np.exp(np.where(seen, logits - logits.max(-1, keepdims=True), -np.inf))
    want = np.einsum("BGQTS,BSGK->BTGQK", weight / weight.sum(-1, keepdims=True), value).reshape(2, T, 4, 128)
    for row, length in enumerate(lengths):
        error = np.asarray(got, np.float64)[row, :length] - want[row, :length]
        assert np.linalg.norm(error) < LIMIT * np.linalg.norm(want[row, :length])
    assert mosaic_tpu_prefill.unsupported(200, 128, "bfloat16", "TPU v5") is not None
    assert "bfloat16, not float32" in mosaic_tpu_prefill.unsupported(256, 128, "float32", "TPU v5")
    assert mosaic_tpu_prefill.unsupported(256, 128, "bfloat16", "cpu") == "it needs a TPU"


def test_derivatives_of_prefill():
    """What fine-tuning needs: with respect to query, key and value, against those of XLA in float32."""
    rng = np.random.default_rng(7)
    arrays = [jnp.asarray(rng.normal(0.2, 1, (1, 128, heads, 128)), jnp.bfloat16) for heads in (2, 1, 1, 2)]

    def gradients(attend, query, key, value, weight):
        def loss(query, key, value):
            return jnp.sum(attend(query, key, value).astype(jnp.float32) * weight.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    options = dict(scale=128**-0.5, sliding_window=None)
    splash = functools.partial(mosaic_tpu_prefill.attend_prefill, **options)
    plain = functools.partial(xla.attend_prefill, lengths_B=None, **options)
    got = interpreted(functools.partial(gradients, splash), *arrays)
    want = gradients(plain, *(array.astype(jnp.float32) for array in arrays))
    for ours, theirs in zip(got, want, strict=True):
        error = np.asarray(ours, np.float64) - np.asarray(theirs)
        assert np.linalg.norm(error) < 3 * LIMIT * np.linalg.norm(theirs)


def test_float16_bits():
    rng = np.random.default_rng(5)
    edges = [0, -0.0, 65504, 2**-14, 2**-24, 2**-25, 3 * 2**-25, 2**-14 - 2**-25, 65519.9, 1 + 2**-11, 1 + 3 * 2**-11]
    x = np.concatenate([rng.normal(0, 1, 4000) * 10.0 ** rng.uniform(-9, 4, 4000), edges]).astype(np.float32)
    bits = np.asarray(tpu.half_bits_of_float(jnp.asarray(x)))
    want = x.astype(np.float16)
    np.testing.assert_array_equal(bits.astype(np.uint16), want.view(np.uint16))
    np.testing.assert_array_equal(tpu.float_of_half_bits(jnp.asarray(bits)), want.astype(np.float32))


def test_choice_and_dtype_of_scales():
    shape = AttentionShape(8, 28, 4, 128, 2048, True, "bfloat16")
    assert choose(shape, "TPU v6 lite").name == "mosaic_tpu"
    assert dict(choose(shape, "cpu").refusals)["mosaic_tpu"] == "it needs a TPU"
    with pytest.raises(ValueError, match="it computes with bfloat16 queries, not float32"):
        choose(dataclasses.replace(shape, dtype="float32"), "TPU v5", "mosaic_tpu")
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 up to 256, got 40"):
        choose(dataclasses.replace(shape, head_dim=40), "TPU v5", "mosaic_tpu")
    assert (scale_dtype("TPU v5 lite"), scale_dtype("cpu"), scale_dtype()) == ("int16", "float16", "float16")


@pytest.mark.parametrize(("heads", "kv_heads", "bias"), [(32, 32, False), (28, 4, True)])
def test_traffic(monkeypatch, heads, kv_heads, bias):
    """Valid blocks once; a slot of half the length costs half. With a bias, tables of one block and coefficients."""
    struct, B, S, K = jax.ShapeDtypeStruct, 8, 2048, 128
    scales = [struct((4, B, kv_heads, S), jnp.int16)] * 4
    kv = KVArrays(*[struct((4, B, kv_heads, S, K), jnp.uint8)] * 2, *scales)
    options = {"scale": 0.1, "key_bias_GK": None, "key_rotary": None, "sliding_window": None, "active_length": None}
    if bias:
        options["key_bias_GK"] = jnp.zeros((kv_heads, K))
        options["key_rotary"] = (jnp.ones((1, S, K // 2)),) * 2
    query, lengths = jnp.zeros((B, heads, K), jnp.bfloat16), np.array([S] * 7 + [S // 2])
    call = lambda: mosaic_tpu.attend_decode(query, kv, 3, jnp.asarray(lengths), **options)  # noqa: E731
    (moved,) = count_bytes(monkeypatch, call, [np.array([3, *lengths])])
    cache = kv_heads * int(lengths.sum()) * (2 * K + 8)
    assert cache < moved < 1.05 * cache

"""Dense matmul, embedding lookup, their layouts and the 8-bit head against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.dense_matmul import (
    DenseTensor,
    dense_matmul,
    embedding_lookup,
    layout,
    prepack,
    quantize_head,
    unpack,
    xla,
)
from pallas_kernels.quantized_matmul import quantized_matmul

FORMS = [
    (dtype, name)
    for dtype in ("float32", "bfloat16", "float16")
    for name in ("transposed", "plain", "row_pairs")
    if (dtype, name) != ("float32", "row_pairs")
]


def make(dtype, name, shape=(2, 40, 96)):
    """(DenseTensor in the layout, float64 [*stack, in, out])."""
    data = np.random.default_rng(0).normal(0.2, 1, shape).astype(dtype)
    data[..., 0, :4] = np.array([6e-8, -3e-5, -6e-5, 0], dtype)  # the first two are subnormal in float16
    weight = DenseTensor(data, dtype, shape[-1])
    return getattr(layout, f"to_{name}")(weight), data.swapaxes(-1, -2).astype(np.float64)


def error(got, want):
    return np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want)


@functools.partial(jax.jit, static_argnames=("chip", "kernels"))
def run(x_MI, weight, layer, bias_O=None, chip="cpu", kernels="auto"):
    return dense_matmul(x_MI, weight, layer=layer, bias_O=bias_O, chip=chip, kernels=kernels)


@pytest.mark.parametrize("chip", ["cpu", "NVIDIA A100-SXM4-80GB"])
@pytest.mark.parametrize(("dtype", "name"), FORMS)
def test_matmul(dtype, name, chip):
    weight, matrices = make(dtype, name)
    bias_O = jnp.linspace(-2, 2, 40)
    for rows in (1, 3, 20):
        x_MI = jnp.asarray(np.random.default_rng(rows).normal(0.5, 1, (rows, 96)), jnp.float32)
        want_MO = np.asarray(x_MI, np.float64) @ matrices[1] + np.asarray(bias_O, np.float64)
        for kernels in ("auto", "exact") if rows == 3 else ("auto",):
            assert error(run(x_MI, weight, jnp.int32(1), bias_O, chip=chip, kernels=kernels), want_MO) < 1e-6
        half = x_MI.astype(jnp.bfloat16)
        want_MO = np.asarray(half.astype(jnp.float32), np.float64) @ matrices[1]
        got_MO = run(half, weight, jnp.int32(1), chip=chip)
        assert got_MO.dtype == jnp.bfloat16 and error(got_MO, want_MO) < 2**-8
        wrong_MO = run(half, weight, jnp.int32(0), chip=chip)
        assert error(wrong_MO, want_MO) > 10 * 2**-8


@pytest.mark.parametrize("name", ["plain", "row_pairs"])
def test_float16_elements_are_widened_exactly(name):
    """Subnormal ones too, which a multiplication by a power of two would flush to zero."""
    weight, matrices = make("float16", name, (40, 96))
    got = run(jnp.eye(96, dtype=jnp.float32)[:4], weight, None)
    np.testing.assert_array_equal(np.asarray(got), matrices[:4].astype(np.float32))


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize(("dtype", "name"), FORMS)
def test_layouts_go_back_exactly(dtype, name, xp):
    weight, matrices = make(dtype, "transposed")
    weight = DenseTensor(xp.asarray(weight.data), dtype, 96)
    other = getattr(layout, f"to_{name}")(weight)
    assert (other.layout, other.out_features, other.stack) == (name, 40, (2,))
    assert isinstance(other.data, np.ndarray) == (xp is np)
    back = unpack(other)
    assert back.layout == "transposed"
    np.testing.assert_array_equal(np.asarray(back.data), np.asarray(weight.data))
    if xp is np:
        assert other.data.flags.c_contiguous and back.data.flags.c_contiguous
    if name == "row_pairs":
        low = (np.asarray(other.data).view(np.uint32) & 0xFFFF).astype(np.uint16).view(dtype)
        np.testing.assert_array_equal(low.astype(np.float64), matrices[:, 0::2])


def test_layout_refused():
    with pytest.raises(ValueError, match="layout 'row_pairs' holds .* an even number of rows, got float32 and 96"):
        layout.to_row_pairs(make("float32", "plain")[0])


def test_prepack_by_chip():
    assert prepack(make("bfloat16", "transposed")[0], chip="cpu").layout == "row_pairs"
    assert prepack(make("float32", "transposed")[0], chip="cpu").layout == "plain"
    assert prepack(make("bfloat16", "transposed")[0], chip="NVIDIA H100 80GB HBM3").layout == "transposed"


@pytest.mark.parametrize(("dtype", "name"), FORMS)
def test_embedding_lookup(dtype, name):
    table, columns = make(dtype, name, (40, 96))
    ids = np.array([[3, 0, 39], [7, 7, 1]])
    got = embedding_lookup(table, jnp.asarray(ids))
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got).astype(np.float64), columns.T[ids])


def test_embedding_lookup_errors():
    with pytest.raises(ValueError, match="embedding_lookup: the table has stack"):
        embedding_lookup(make("float32", "plain")[0], jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="ids must be integers, got float32"):
        embedding_lookup(make("float32", "plain", (40, 96))[0], jnp.zeros(1))


@pytest.mark.parametrize("name", ["transposed", "row_pairs"])
def test_large_weights_are_converted_in_parts(name, monkeypatch):
    weight, matrices = make("bfloat16", name, (40, 96))
    x_MI = jnp.asarray(np.random.default_rng(1).normal(0.5, 1, (12, 96)), jnp.float32)
    monkeypatch.setattr(xla, "MAX_COPY_BYTES", 96 * 4 * 11)  # at most 11 columns: 4 parts of 10

    def parts(x_MI, weight):
        return dense_matmul(x_MI, weight, chip="cpu")

    text = jax.jit(parts).lower(x_MI, weight).as_text()
    assert "96x10xf32" in text or "10x96xf32" in text
    assert error(jax.jit(parts)(x_MI, weight), np.asarray(x_MI, np.float64) @ matrices) < 1e-6


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "row_pairs"), ("float16", "row_pairs"), ("float32", "plain")])
def test_decoding_makes_no_float_copy(dtype, name):
    width, layers = 512, 4
    data = jax.ShapeDtypeStruct((layers, width // (2 if name == "row_pairs" else 1), width), jnp.int32)
    if name == "plain":
        data = jax.ShapeDtypeStruct(data.shape, jnp.float32)
    weight = DenseTensor(data, dtype, width, name)

    def decode(x_MI, weight):
        step = lambda x_MI, layer: (dense_matmul(x_MI, weight, layer=layer, chip="cpu"), None)  # noqa: E731
        return lax.scan(step, x_MI, jnp.arange(layers))[0]

    lowered = jax.jit(decode).lower(jax.ShapeDtypeStruct((1, width), jnp.float32), weight)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < width * width  # a copy of one layer: 4 times that


@pytest.mark.parametrize(("inputs", "group_size"), [(128, 64), (100, 64), (30, 16)])
def test_quantized_head(inputs, group_size):
    """Nearest of 255 steps, nothing clipped, exact zeros where a group is zero."""
    rng = np.random.default_rng(0)
    weight_VD = rng.normal(0, 0.05, (33, inputs)).astype(np.float32)
    weight_VD[3, :group_size] = 0
    weight_VD[4] *= 1e-8
    head = quantize_head(DenseTensor(weight_VD, "float32", inputs), group_size)
    assert (head.bits, head.zeros, head.in_features) == (8, None, inputs)
    got_DV = np.asarray(jax.jit(quantized_matmul)(jnp.eye(inputs), head))
    padded = np.pad(weight_VD, ((0, 0), (0, -inputs % group_size))).reshape(33, -1, group_size)
    step = np.repeat(np.abs(padded).max(-1) / 127, group_size, axis=1)[:, :inputs]
    assert (np.abs(got_DV.T - weight_VD) <= step * 0.505).all()
    assert not got_DV[:group_size, 3].any()


def test_quantized_head_takes_one_matrix():
    with pytest.raises(ValueError, match="quantize_head: the head has stack"):
        quantize_head(make("float32", "plain")[0])

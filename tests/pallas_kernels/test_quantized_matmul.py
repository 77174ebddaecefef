"""Quantized matmul against NumPy float64 that unpacks the bit streams itself."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import block_sums
from pallas_kernels.quantized_matmul import MatmulShape, QuantizedTensor, choose, op, prepack, quantized_matmul, unpack
from pallas_kernels.quantized_matmul.shapes import SMALL_SHAPES

LIMITS = {"float32": 3e-6, "bfloat16": 2**-8, "float16": 2**-11}  # 16 bits: half a unit in the last place
CHIPS = ("cpu", "NVIDIA A100-SXM4-80GB")  # both run here; the name picks the form


def pack(q_IO, bits):
    """int32 words [ceil(I · bits / 32), O]: each column one bit stream, lowest bit first, as Python integers."""
    words = -(-q_IO.shape[0] * bits // 32)
    packed = np.zeros((words, q_IO.shape[1]), np.uint32)
    for column in range(q_IO.shape[1]):
        stream = sum(int(value) << (bits * row) for row, value in enumerate(q_IO[:, column]))
        packed[:, column] = [stream >> (32 * word) & 0xFFFFFFFF for word in range(words)]
    return packed.view(np.int32)


@functools.cache
def make(shape, scales_dtype="float32"):
    """(QuantizedTensor, its float64 matrices [layers or 1, I, O] in the order of the inputs)."""
    rng = np.random.default_rng(shape.in_features + shape.out_features + shape.bits)
    I, O, layers = shape.in_features, shape.out_features, max(shape.layers, 1)  # noqa: E741
    groups = -(-I // shape.group_size)
    q = rng.integers(0, 2**shape.bits, (layers, I, O))
    scales = rng.uniform(0.5, 1.5, (layers, groups, O)).astype(scales_dtype)
    zeros = rng.integers(1, 2**shape.bits - 1, (layers, groups, O)).astype(np.uint8) if shape.zeros else None
    permutation = np.stack([rng.permutation(I) for _ in range(layers)]).astype(np.int32) if shape.permutation else None
    weight = QuantizedTensor(
        np.stack([pack(matrix, shape.bits) for matrix in q]),
        scales,
        zeros,
        permutation,
        bits=shape.bits,
        group_size=shape.group_size,
        in_features=I,
    )
    if not shape.layers:
        weight = jax.tree.map(lambda leaf: leaf[0], weight)
    return weight, float64_matrices(q, scales, zeros, permutation, shape)


def float64_matrices(q, scales, zeros, permutation, shape):
    group = np.arange(shape.in_features) // shape.group_size
    zero = 2 ** (shape.bits - 1) if zeros is None else zeros[:, group].astype(int)
    stored = scales.astype(np.float64)[:, group] * (q - zero)
    if permutation is None:
        return stored
    matrices = np.empty_like(stored)
    for matrix, rows, inputs in zip(matrices, stored, permutation, strict=True):
        matrix[inputs] = rows
    return matrices


def inputs(rows, shape, dtype, mean=0.5):
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.normal(mean, 1, (rows, shape.in_features)), dtype)


def error(got, want):
    got = np.asarray(got).astype(np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@functools.partial(jax.jit, static_argnames=("kernels", "chip"))
def run(x_MI, weight, layer, bias_O=None, kernels="xla", chip="cpu"):
    return quantized_matmul(x_MI, weight, layer=layer, bias_O=bias_O, kernels=kernels, chip=chip)


def with_zeros_off_by_one(weight):
    """What a reader of the wrong zero-point convention would make of the same file."""
    zeros = weight.zeros
    if zeros is None:
        zeros = np.full(weight.scales.shape, 2 ** (weight.bits - 1), np.uint8)
    return dataclasses.replace(weight, zeros=zeros + np.uint8(1))


@pytest.mark.parametrize(
    ("shape", "chip"),
    # XLA on a CPU lacks a few of the 16-bit dots that other chips' form consists of.
    [(shape, "cpu") for shape in SMALL_SHAPES] + [(shape, CHIPS[1]) for shape in SMALL_SHAPES if not shape.permutation],
    ids=str,
)
def test_small_shapes(shape, chip):
    weight, matrices = make(shape)
    layer = shape.layers - 1 if shape.layers else None
    x_MI = inputs(shape.rows, shape, shape.dtype)
    want_MO = np.asarray(x_MI.astype(jnp.float32), np.float64) @ matrices[-1]
    # Off the CPU the weight itself is rounded to 16 bits: two roundings.
    assert error(run(x_MI, weight, layer, chip=chip), want_MO) < LIMITS[shape.dtype] * (1 if chip == "cpu" else 1.5)


@pytest.mark.parametrize(("kernels", "chip"), [*[("xla", chip) for chip in CHIPS], ("exact", "cpu")])
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_small_shapes_in_float32(shape, kernels, chip):
    """One step of a zero-point, which 16 bits can hide in an 8-bit weight, is far outside the limit."""
    weight, matrices = make(shape)
    layer = shape.layers - 1 if shape.layers else None
    x_MI, multiply = inputs(shape.rows, shape, "float32"), functools.partial(run, kernels=kernels, chip=chip)
    want_MO = np.asarray(x_MI, np.float64) @ matrices[-1]
    assert error(multiply(x_MI, weight, layer), want_MO) < LIMITS["float32"]
    assert error(multiply(x_MI, with_zeros_off_by_one(weight), layer), want_MO) > 10 * LIMITS["float32"]


@pytest.mark.parametrize(
    ("group_size", "chip"),
    [(64, "cpu"), (128, "cpu"), (20, "cpu"), (200, "cpu"), (128, CHIPS[1]), (20, CHIPS[1])],
    ids=["group64", "group128", "group20", "per-channel", "group128-elsewhere", "group20-elsewhere"],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}bits".format)
def test_bits_and_groups(bits, group_size, chip):
    """200 inputs: a short last group for 64 and 128, and blocks of 8 rows; 20: no block of whole words."""
    shape = MatmulShape(3, 200, 24, bits=bits, group_size=group_size, zeros=bits != 4, dtype="float32")
    weight, matrices = make(shape, "float16")
    for rows in (3, 9):
        x_MI = inputs(rows, shape, "float32")
        assert error(run(x_MI, weight, None, chip=chip), np.asarray(x_MI, np.float64) @ matrices[0]) < LIMITS["float32"]


@pytest.mark.parametrize("dtype", LIMITS)
def test_dtypes_bias_and_leading_dimensions(dtype):
    shape = SMALL_SHAPES[3]
    weight, matrices = make(shape)
    x_BTI = inputs(6, shape, dtype).reshape(2, 3, -1)
    bias_O = jnp.linspace(-30, 30, shape.out_features)
    got_BTO = run(x_BTI, weight, None, bias_O)
    assert got_BTO.dtype == dtype and got_BTO.shape == (2, 3, shape.out_features)
    want = np.asarray(x_BTI.astype(jnp.float32), np.float64) @ matrices[0] + np.asarray(bias_O)
    assert error(got_BTO, want) < LIMITS[dtype]


@pytest.mark.parametrize("rows", [1, 20])
def test_each_layer_of_a_stack(rows):
    shape = dataclasses.replace(SMALL_SHAPES[-1], rows=rows)
    weight, matrices = make(shape)
    x_MI = inputs(rows, shape, "float32")
    for layer, matrix in enumerate(matrices):
        want_MO = np.asarray(x_MI, np.float64) @ matrix
        assert error(run(x_MI, weight, jnp.int32(layer)), want_MO) < LIMITS["float32"]
    assert error(quantized_matmul(x_MI, weight, layer=len(matrices) - 1), want_MO) < LIMITS["float32"]


def test_no_weight_is_zero_scaled_to_nan():
    """A group of zeros, stored as zero-points, gives exactly 0."""
    weight, _ = make(MatmulShape(1, 64, 8, group_size=32))
    nothing = dataclasses.replace(weight, packed=np.full_like(weight.packed, np.uint32(0x88888888).view(np.int32)))
    assert not np.asarray(run(jnp.full((1, 64), 3.0), nothing, None)).any()


@pytest.mark.parametrize("chip", CHIPS)
def test_sums_are_float32_and_do_not_depend_on_the_rows(chip):
    """4096 inputs of 64 against +1 and −1 cancel exactly; 16-bit sums would overflow or round."""
    half = np.full((2048, 16), 1)
    weight = QuantizedTensor(
        pack(np.concatenate([8 + 7 * half, 8 - 7 * half]), 4),
        np.full((32, 16), 1 / 7, np.float16),
        None,
        None,
        bits=4,
        group_size=128,
        in_features=4096,
    )
    noise = np.random.default_rng(0).normal(0, 1, (256, 4096))
    alone = None
    for rows in (1, 8, 16, 64, 256):
        same = jnp.full((rows, 4096), 64, jnp.float16)
        assert float(jnp.abs(run(same, weight, None, chip=chip)).max()) <= 1e-2
        first_O = run(jnp.asarray(noise[:rows], jnp.float16), weight, None, chip=chip)[0].astype(jnp.float32)
        alone = first_O if alone is None else alone
        assert float(jnp.abs(first_O - alone).max()) <= 1e-3 * float(jnp.abs(alone).max())


@pytest.mark.parametrize("rows", [1, 8])
def test_decoding_makes_no_float_copy(rows):
    """Neither of all layers nor of one: what is not packed is the sums of the blocks."""
    shape = MatmulShape(rows, 512, 512, group_size=64, layers=4)
    packed = jax.ShapeDtypeStruct((4, 64, 512), jnp.int32)
    scales = jax.ShapeDtypeStruct((4, 8, 512), jnp.float16)
    weight = QuantizedTensor(packed, scales, None, None, bits=4, group_size=64, in_features=512)

    def decode(x_MI, weight):
        step = lambda x_MI, layer: (quantized_matmul(x_MI, weight, layer=layer, chip="cpu"), None)  # noqa: E731
        return lax.scan(step, x_MI, jnp.arange(4))[0]

    def temporary_bytes():
        x_MI = jax.ShapeDtypeStruct((rows, 512), jnp.float32)
        return jax.jit(decode).lower(x_MI, weight).compile().memory_analysis().temp_size_in_bytes

    sums = rows * 8 * 512 * 4
    assert "registers" in choose(shape, "cpu").form
    assert temporary_bytes() < 3 * sums + 2**14 < 512 * 512 * 4


def test_large_sums_take_the_rows_one_at_a_time(monkeypatch):
    shape = SMALL_SHAPES[2]
    weight, matrices = make(shape)
    x_MI = inputs(8, shape, "float32")
    monkeypatch.setattr(block_sums, "MAX_SUM_BYTES", 1000)
    assert error(quantized_matmul(x_MI, weight, chip="cpu"), np.asarray(x_MI, np.float64) @ matrices[0]) < 3e-6


def test_choice_by_chip_and_rows(caplog):
    op.log_choice.cache_clear()
    shape = MatmulShape(1, 576, 960, group_size=64)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert choose(shape, "cpu").form == "packed words decoded in registers"
        choose(dataclasses.replace(shape, rows=2), "cpu")
    assert [record.message.split(" (not ")[0] for record in caplog.records] == [
        "quantized_matmul on cpu: xla (packed words decoded in registers)"
    ]
    assert "float32 dot" in choose(dataclasses.replace(shape, rows=9), "cpu").form
    assert "float32 dot" in choose(dataclasses.replace(shape, group_size=20), "cpu").form
    for rows, chip, form in ((3, CHIPS[1], "a sum"), (4, CHIPS[1], "a bfloat16 dot"), (1, "TPU v5", "a bfloat16 dot")):
        assert form in choose(dataclasses.replace(shape, rows=rows), chip, "xla").form
    with pytest.raises(ValueError, match=r"kernels='fast' is none of \['auto', .*'exact'\]"):
        choose(shape, "cpu", "fast")
    with pytest.raises(ValueError, match="kernels='xla' cannot run .* layout 'gptq', not 'other'"):
        choose(dataclasses.replace(shape, layout="other"), "cpu", "xla")


def test_a_gpu_reads_words_for_one_row():
    """Nothing as large as the dequantized matrix is an operand of a dot."""
    weight, _ = make(MatmulShape(1, 256, 64))
    traced = jax.jit(functools.partial(quantized_matmul, kernels="xla", chip=CHIPS[1])).trace
    for rows, dots in ((1, 0), (8, 1)):
        text = traced(jnp.ones((rows, 256), jnp.bfloat16), weight).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.dot_general") == dots


def test_prepacking_on_a_cpu_changes_nothing():
    weight, _ = make(SMALL_SHAPES[1])
    assert prepack(weight, chip="cpu") is weight and unpack(weight) is weight
    with pytest.raises(ValueError, match="layout='mystery' belongs to none"):
        unpack(dataclasses.replace(weight, layout="mystery"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_MI": jnp.ones((1, 100))}, r"x has shape \(1, 100\), its last dimension must be in_features = 256"),
        ({"x_MI": jnp.ones((1, 256), jnp.int32)}, "x must be float32, bfloat16 or float16, got int32"),
        ({"layer": None}, "a stack of 3 matrices, give layer="),
        ({"layer": 3}, "layer=3 is outside the stack of 3"),
        ({"bias_O": jnp.ones(7)}, r"bias has shape \(7,\), expected \(64,\)"),
    ],
)
def test_errors(arguments, message):
    weight, _ = make(SMALL_SHAPES[7])
    with pytest.raises(ValueError, match="quantized_matmul: .*" + message):
        quantized_matmul(**{"x_MI": jnp.ones((1, 256)), "weight": weight, "layer": 0} | arguments)


def test_error_of_a_layer_without_a_stack():
    weight, _ = make(SMALL_SHAPES[0])
    with pytest.raises(ValueError, match="layer=0 given for a single matrix"):
        quantized_matmul(jnp.ones((1, 128)), weight, layer=0)

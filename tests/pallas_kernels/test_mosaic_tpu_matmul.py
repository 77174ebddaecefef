"""The TPU matmul under the TPU interpreter, against NumPy float64; memory that nothing wrote is NaN there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul import (
    MatmulShape,
    QuantizedTensor,
    choose,
    layout,
    mosaic_tpu,
    prepack,
    quantized_matmul,
    unpack,
)
from pallas_kernels.quantized_matmul.reference import dequantize
from tests.pallas_kernels.tpu_traffic import count_bytes

V5E, V6E, V5P = "TPU v5 lite", "TPU v6 lite", "TPU v5"
LIMITS = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 1e-5}


@functools.cache
def make(shape: MatmulShape, scales: str = "float16"):
    rng = np.random.default_rng(shape.in_features + shape.out_features)
    stack = (shape.layers,) if shape.layers else ()
    groups = -(-shape.in_features // shape.group_size)
    q = rng.integers(0, 2**shape.bits, (*stack, shape.in_features, shape.out_features))
    zeros = None
    if shape.zeros:
        zeros = rng.integers(1, 2**shape.bits - 1, (*stack, groups, shape.out_features)).astype(np.uint8)
    # Down to float16's denormals, as scales of 8-bit weights are.
    values = (rng.uniform(0.5, 1.5, (*stack, groups, shape.out_features)) * 6e-5).astype(scales)
    permutation = None
    if shape.permutation:
        permutation = np.broadcast_to(rng.permutation(shape.in_features), (*stack, shape.in_features))
    return layout.from_integers(q, values, zeros, permutation, bits=shape.bits, group_size=shape.group_size)


def interpreted(x_MI, weight, layer=None, bias_O=None, chip=V5E, packed=True):
    weight = jax.tree.map(jnp.asarray, weight)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        weight = prepack(weight, chip=chip) if packed else weight
        return np.asarray(quantized_matmul(x_MI, weight, layer=layer, bias_O=bias_O, chip=chip).astype(jnp.float32))


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def inputs(shape: MatmulShape):
    x = np.random.default_rng(shape.rows).normal(0.5, 1, (shape.rows, shape.in_features))
    return jnp.asarray(x, shape.dtype)


@pytest.mark.parametrize(
    ("shape", "chip"),
    [
        (MatmulShape(3, 256, 200, zeros=True, layers=2), V5E),  # columns that fill no block
        (MatmulShape(1, 512, 128, group_size=64), V6E),  # groups that share a tile
        (MatmulShape(2, 320, 96, group_size=128, zeros=True, permutation=True), V5E),  # a short last group
        (MatmulShape(9, 200, 64, group_size=20, zeros=True), V6E),  # groups that no tile is a multiple of
        (MatmulShape(4, 640, 256, bits=8, group_size=640, zeros=True), V6E),  # one group
        (MatmulShape(8, 256, 384, bits=8, group_size=32, layers=2), V5P),  # two cores
        (MatmulShape(5, 256, 64, group_size=64, dtype="float16"), V6E),
        (MatmulShape(5, 256, 64, bits=8, zeros=True, dtype="float32"), V5E),
        (MatmulShape(70, 200, 64, group_size=20, zeros=True), V6E),  # from here on many rows
        (MatmulShape(300, 384, 200, group_size=32, layers=2), V5E),
        (MatmulShape(65, 320, 96, bits=8, group_size=128, zeros=True, permutation=True), V5E),
    ],
    ids=str,
)
def test_against_float64(shape, chip):
    weight = make(shape)
    layer = shape.layers - 1 if shape.layers else None
    x_MI, bias_O = inputs(shape), np.linspace(-1e-3, 1e-3, shape.out_features, dtype=np.float32)
    matrix = dequantize(weight) if layer is None else dequantize(weight)[layer]
    want = np.asarray(x_MI.astype(jnp.float32), np.float64) @ matrix + bias_O
    got = interpreted(x_MI, weight, None if layer is None else jnp.int32(layer), jnp.asarray(bias_O), chip)
    assert error(got, want) < LIMITS[shape.dtype]
    # One step of one group's zero-point is seen.
    zeros = np.full(weight.scales.shape, 2 ** (shape.bits - 1), np.uint8) if weight.zeros is None else weight.zeros
    off = dataclasses.replace(weight, zeros=zeros + np.uint8(16 if shape.bits == 8 else 1))
    wrong = np.asarray(x_MI.astype(jnp.float32), np.float64) @ (
        dequantize(off) if layer is None else dequantize(off)[layer]
    )
    assert error(got, wrong + bias_O) > 5 * LIMITS[shape.dtype]


@pytest.mark.parametrize("rows", [2, 80])
def test_the_file_s_own_layout_and_other_scales(rows):
    shape = MatmulShape(rows, 256, 96, group_size=96, zeros=True, layers=2)
    for scales in ("float16", "bfloat16", "float32"):
        weight = make(shape, scales)
        want = np.asarray(inputs(shape).astype(jnp.float32), np.float64) @ dequantize(weight)[1]
        assert error(interpreted(inputs(shape), weight, 1, packed=False), want) < LIMITS["bfloat16"]


def test_one_row_gives_the_same_whatever_the_others_are():
    """4096 inputs of 64 against +1 and −1 cancel exactly; 16-bit sums would overflow or round."""
    half = np.full((1024, 16), 1)
    weight = layout.from_integers(
        np.concatenate([8 + 7 * half, 8 - 7 * half]), np.full((16, 16), 1 / 7, np.float16), bits=4, group_size=128
    )
    noise = np.random.default_rng(0).normal(0, 1, (80, 2048))
    alone = interpreted(jnp.asarray(noise[:1], jnp.float16), weight)[0]
    together = interpreted(jnp.asarray(noise, jnp.float16), weight)[0]
    assert np.abs(together - alone).max() <= 1e-3 * np.abs(alone).max()
    for rows, dtype in ((1, "float16"), (80, "bfloat16")):
        assert np.abs(interpreted(jnp.full((rows, 2048), 64, dtype), weight)).max() <= 1e-2


def test_prepacking_and_back():
    """Bit for bit, with padding that is taken off again."""
    for array in (np.asarray, jnp.asarray):
        weight = jax.tree.map(array, make(MatmulShape(1, 200, 64, group_size=20, zeros=True, layers=2)))
        packed = mosaic_tpu.prepack(weight)
        assert packed.scales.dtype == jnp.int16 and packed.packed.shape[-2] % 8 == packed.scales.shape[-2] % 8 == 0
        back = unpack(packed)
        for old, new in zip(jax.tree.leaves(weight), jax.tree.leaves(back), strict=True):
            assert old.dtype == new.dtype and (np.asarray(old) == np.asarray(new)).all()
        assert back.layout == "gptq"


def test_choice():
    shape = MatmulShape(1, 4096, 12288)
    for chip in (V5E, V5P, V6E):
        assert choose(shape, chip).name == "mosaic_tpu"
    assert "tiles of 256 rows" in choose(shape, V6E).form
    assert "dequantized to bfloat16" in choose(dataclasses.replace(shape, rows=2048), V6E).form
    assert "read 2 times" in choose(dataclasses.replace(shape, rows=100, dtype="float32"), V6E).form
    assert dict(choose(shape, "cpu").refusals)["mosaic_tpu"] == "it needs a TPU"
    assert "TPU v5 lite" in dict(choose(shape, "TPU v2").refusals)["mosaic_tpu"]
    with pytest.raises(ValueError, match="it reads 4 and 8 bits, not 3"):
        choose(dataclasses.replace(shape, bits=3), V5E, "mosaic_tpu")
    with pytest.raises(ValueError, match="64 groups of 2 rows meet in a tile"):
        choose(dataclasses.replace(shape, group_size=2), V5E, "mosaic_tpu")
    with pytest.raises(ValueError, match="it reads layouts 'gptq' and 'mosaic_tpu', not 'other'"):
        choose(dataclasses.replace(shape, layout="other"), V5E, "mosaic_tpu")


@pytest.mark.parametrize(("bits", "chip"), [(4, V5E), (4, V5P), (8, V6E)])
@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 12288), (11008, 4096), (29568, 8192)])
def test_traffic_of_decoding(monkeypatch, in_features, out_features, bits, chip):
    """Within 5 % of what cannot be avoided: every weight once, x once a core, the result."""
    groups, words = in_features // 128, in_features * bits // 32
    struct = jax.ShapeDtypeStruct
    weight = QuantizedTensor(
        struct((4, words, out_features), jnp.int32),
        struct((4, groups, out_features), jnp.int16),
        None,
        None,
        bits=bits,
        group_size=128,
        in_features=in_features,
        layout="mosaic_tpu",
    )
    x_MI = jnp.zeros((8, in_features), jnp.bfloat16)
    (moved,) = count_bytes(monkeypatch, lambda: mosaic_tpu.run(x_MI, weight, 2, None, chip), [np.array([2, 2])])
    floor = (words * 4 + groups * 2) * out_features + x_MI.nbytes + 8 * out_features * 2
    assert floor <= moved < 1.05 * floor

"""Hopper quantized matmul: layout, interpreted kernels against float64, CUDA lowering, tilings; fast forms on a card.

Interpreted kernels run with plain forms of the two pieces that the interpreter lacks (`mosaic_gpu_portable`); copies,
rings and barriers are the kernels' own, under race detection. Marked gpu: the fast pieces.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul import layout, mosaic_gpu, reference
from pallas_kernels.quantized_matmul import layout_mosaic_gpu as own_layout
from pallas_kernels.quantized_matmul import mosaic_gpu_large as large
from pallas_kernels.quantized_matmul import mosaic_gpu_small as small
from pallas_kernels.quantized_matmul.shapes import MODELS, MatmulShape
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

CHIP = "NVIDIA H100 80GB HBM3"
LIMIT = 4e-3


def make(in_features, out_features, *, bits=4, group_size=128, layers=0, zeros=False, scales="float16", seed=0):
    """(QuantizedTensor in layout "gptq", its float64 matrix or matrices)."""
    rng = np.random.default_rng(seed)
    stack = (layers,) if layers else ()
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size)
    q = rng.integers(0, 2**bits, (*stack, in_features, out_features))
    scale = (rng.random((*stack, groups, out_features)) + 0.5).astype(jnp.dtype(scales))
    zero = rng.integers(0, 2**bits, (*stack, groups, out_features)) if zeros else None
    weight = layout.from_integers(q, scale, zero, bits=bits, group_size=size)
    return weight, reference.dequantize(weight)


def inputs(rows, in_features, dtype="bfloat16"):
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.normal(0.5, 1, (rows, in_features)), dtype)


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_features", "out_features", "options"),
    [
        (128, 64, {}),
        (320, 40, {"zeros": True}),
        (192, 33, {"bits": 8, "group_size": 64, "layers": 2, "zeros": True}),
        (200, 96, {"bits": 8, "group_size": 32}),
        (1000, 65, {"group_size": -1}),
    ],
)
def test_prepack_goes_back_exactly(in_features, out_features, options):
    weight, _ = make(in_features, out_features, **options)
    packed = own_layout.prepack(weight)
    assert packed.out_features == out_features
    back = own_layout.unpack(packed)
    for before, after in zip(jax.tree.leaves(weight), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(before, after)
    assert jax.tree.structure(weight) == jax.tree.structure(back)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_lie_where_a_lane_reads_them(bits):
    weight, _ = make(256, 96, bits=bits, group_size=64)
    q = layout.unpack(weight.packed, bits, 256)
    packed = np.asarray(own_layout.prepack(weight).packed)
    rng = np.random.default_rng(1)
    for _ in range(300):  # PTX: operand A of mma.m16n8k16, lane 4g + t, register (row ≥ 8) + 2 (column ≥ 8)
        row, column = rng.integers(256), rng.integers(96)
        (chunk, within), (strip, a_row) = divmod(row, 128), divmod(column, 16)
        (step, a_column), (high_row, g) = divmod(within, 16), divmod(a_row, 8)
        high_column, rest = divmod(a_column, 8)
        t, odd = divmod(rest, 2)
        lane = 4 * g + t
        if bits == 4:
            half, place = divmod(step, 4)
            word, field = 128 * half + 4 * lane + place, high_row + 2 * high_column + 4 * odd
        else:
            half, place = divmod(step, 2)
            word, field = 128 * half + 4 * lane + 2 * place + high_column, high_row + 2 * odd
        assert (int(packed[chunk, strip, word]) >> (bits * field)) & (2**bits - 1) == q[row, column]


def test_prepack_refuses_what_it_cannot_hold():
    weight, _ = make(128, 64)
    with pytest.raises(ValueError, match="prepack takes 4 or 8 bits in layout 'gptq', got 4 bits in layout"):
        own_layout.prepack(own_layout.prepack(weight))
    with pytest.raises(ValueError, match="unpack takes layout 'mosaic_gpu', got 'gptq'"):
        own_layout.unpack(weight)


# --- interpreted kernels ---------------------------------------------------------------------------------------------

INTERPRETED = {
    "one row": (1, 512, 64, {}, small.Tiling(2, 2, 1)),
    "ring refilled, zeros, group 64, ragged columns": (
        3, 1536, 40, {"zeros": True, "group_size": 64}, small.Tiling(2, 2, 1)),
    "8 bits, rows that fill no chunk, blocks that overlap": (
        2, 320, 96, {"bits": 8, "zeros": True}, small.Tiling(4, 1, 1)),
    "two row tiles, one group": (9, 320, 40, {"group_size": -1}, small.Tiling(3, 1, 1)),
    "stack, group 32": (2, 256, 64, {"layers": 3, "group_size": 32}, small.Tiling(2, 2, 1)),
    "group of 384 across stages": (2, 1152, 64, {"group_size": 384}, small.Tiling(4, 1, 2)),
    "wgmma: group 64, zeros, two consumers": (
        9, 320, 140, {"group_size": 64, "zeros": True}, large.Tiling(2, 8, 1, 2, True)),
    "wgmma: 8 bits, weights scaled": (
        8, 256, 64, {"bits": 8, "group_size": -1, "zeros": True}, large.Tiling(1, 8, 1, 2, False)),
    "wgmma: stack": (12, 640, 64, {"layers": 2}, large.Tiling(1, 8, 1, 2, True)),
    "wgmma: three consumers": (9, 768, 192, {"zeros": True}, large.Tiling(3, 8, 1, 4, False)),
}  # fmt: skip


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted(case):
    rows, in_features, out_features, options, tiling = INTERPRETED[case]
    weight, matrix = make(in_features, out_features, **options)
    layer = 1 if weight.stack else None
    packed, x = own_layout.prepack(weight), inputs(rows, in_features)
    bias = jnp.asarray(np.random.default_rng(5).normal(0, 20, (*weight.stack, out_features)), jnp.bfloat16)

    def run(weight):
        traced = None if layer is None else jnp.int32(layer)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            return mosaic_gpu.run(x, weight, traced, bias, CHIP, portable=True, tiling=tiling)

    one = bias if layer is None else bias[layer]
    want = np.asarray(x, np.float64) @ (matrix if layer is None else matrix[layer]) + np.asarray(one, np.float64)
    try:
        assert error(run(packed), want) < LIMIT
        assert not interpreter.get_races().races_found
        if case == "one row":  # the test can fail: a scale off by 2 %
            assert error(run(dataclasses.replace(packed, scales=packed.scales * 1.02)), want) > 3 * LIMIT
    finally:
        interpreter.reset_gpu_interpret_mode_state()


# --- lowering --------------------------------------------------------------------------------------------------------


def abstract(rows, in_features, out_features, bits, group_size, layers, zeros, dtype):
    """Shapes of x and of a prepacked weight."""
    stack = (layers,) if layers else ()
    chunks, columns = own_layout.chunks(in_features), -(-out_features // 64) * 64
    each = own_layout.groups_per_chunk(group_size)
    groups = chunks * each if each > 1 else -(-in_features // group_size)
    scales = jax.ShapeDtypeStruct((*stack, groups, columns), dtype)
    packed = jax.ShapeDtypeStruct((*stack, chunks, columns // 16, 64 * bits), jnp.int32)
    weight = QuantizedTensor(
        packed,
        scales,
        jax.ShapeDtypeStruct(scales.shape, jnp.uint8) if zeros else None,
        None,
        bits,
        group_size,
        in_features,
        mosaic_gpu.LAYOUT,
        columns - out_features,
    )
    return jax.ShapeDtypeStruct((rows, in_features), dtype), weight


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "bits", "group_size", "layers", "zeros", "dtype"),
    [
        (1, 4096, 11008, 4, 128, 0, False, "bfloat16"),
        (8, 11008, 4096, 4, 128, 0, True, "bfloat16"),
        (16, 2048, 5504, 8, 64, 3, True, "float16"),
        (3, 320, 1001, 4, 32, 0, False, "float16"),
        (13, 896, 1152, 8, 896, 2, True, "bfloat16"),
        (33, 4096, 4096, 4, 64, 0, True, "bfloat16"),
        (64, 4096, 12288, 4, 128, 2, False, "bfloat16"),
        (64, 2048, 5504, 8, 128, 0, True, "float16"),
        (256, 11008, 4096, 4, 32, 0, False, "float16"),
        (2048, 4096, 11008, 4, 128, 0, False, "bfloat16"),
        (300, 704, 333, 8, 704, 0, True, "bfloat16"),
    ],
)
def test_lowers_for_cuda(rows, in_features, out_features, bits, group_size, layers, zeros, dtype):
    x, weight = abstract(rows, in_features, out_features, bits, group_size, layers, zeros, jnp.dtype(dtype))
    bias = jax.ShapeDtypeStruct((out_features,), jnp.dtype(dtype))
    layer = jax.ShapeDtypeStruct((), jnp.int32) if layers else None
    traced = jax.jit(lambda *arguments: mosaic_gpu.run(*arguments, CHIP)).trace(x, weight, layer, bias)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    # The stack goes into the kernel whole: no layer of it is sliced out.
    assert "dynamic_slice" not in text


@pytest.mark.parametrize(
    "tiling",
    [
        (2, 64, 4, 6, True),
        (4, 64, 2, 6, True),
        (3, 160, 1, 4, False),
        (2, 256, 1, 3, False),
    ],
)
def test_every_form_of_large_lowers_for_cuda(tiling):
    x, weight = abstract(256, 4096, 1028, 4, 128, 0, True, jnp.dtype("bfloat16"))
    tiling = large.Tiling(*tiling)
    traced = jax.jit(lambda x, weight: mosaic_gpu.run(x, weight, None, None, CHIP, tiling=tiling)).trace(x, weight)
    traced.lower(lowering_platforms=("cuda",))


# --- choice ----------------------------------------------------------------------------------------------------------


def test_refusals_say_why():
    shape = MatmulShape(1, 4096, 4096, layout=mosaic_gpu.LAYOUT)
    assert mosaic_gpu.unsupported(shape, CHIP) is None
    assert "Hopper" in mosaic_gpu.unsupported(shape, "NVIDIA A100-SXM4-80GB")
    assert "Hopper" in mosaic_gpu.unsupported(shape, "cpu")
    for change, reason in [
        ({"bits": 3}, "4 or 8 bits, not 3"),
        ({"group_size": 96}, "not 96"),
        ({"layout": "gptq"}, "prepack the weight"),
    ]:
        assert reason in mosaic_gpu.unsupported(dataclasses.replace(shape, **change), CHIP)
    assert mosaic_gpu.unsupported(dataclasses.replace(shape, group_size=4096), CHIP) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_every_model_has_a_tiling_that_fits(bits):
    for projections in MODELS.values():
        for in_features, out_features in projections.values():
            for rows in (1, 7, 8, 16, 17, 64, 100, 256, 2048):
                for chip in (CHIP, "NVIDIA H200"):
                    shape = MatmulShape(rows, in_features, out_features, bits, layout=mosaic_gpu.LAYOUT)
                    tiling, _ = mosaic_gpu.choose_tiling(shape, chip)
                    assert mosaic_gpu.fits(tiling, rows, in_features, out_features, bits, 128), (shape, tiling)
                    assert str(tiling) in mosaic_gpu.form(shape, chip)


@pytest.mark.parametrize("chip", [CHIP, "NVIDIA H200"])
def test_tuned_entries_fit_and_are_used(chip):
    entries = mosaic_gpu.tuned(chip)
    assert entries
    for key, by_rows in entries.items():
        bits, _, in_features, _, out_features = (word.strip(",") for word in key.split())
        for rows in by_rows:
            shape = MatmulShape(int(rows), int(in_features), int(out_features), int(bits), layout=mosaic_gpu.LAYOUT)
            tiling, origin = mosaic_gpu.choose_tiling(shape, chip)
            assert origin == "tuned" and list(vars(tiling).values()) == by_rows[rows]["tiling"]
    assert mosaic_gpu.choose_tiling(MatmulShape(1, 4096, 11008), "NVIDIA GH200 480GB")[1] == "computed"


def test_float32_rows_are_exact():
    weight, matrix = make(320, 40, zeros=True, group_size=64)
    x = inputs(3, 320, "float32")
    got = mosaic_gpu.run(x, own_layout.prepack(weight), None, None, CHIP)
    assert error(got, np.asarray(x, np.float64) @ matrix) < 1e-6


# --- on a card -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 33, 64, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("in_features", "out_features", "options"),
    [
        (4096, 2048, {}),
        (1984, 1001, {"zeros": True, "group_size": 64}),
        (1536, 768, {"bits": 8, "zeros": True}),
        (896, 1152, {"bits": 8, "group_size": -1}),
        (1152, 640, {"group_size": 32, "layers": 3}),
    ],
)
def test_on_card(rows, dtype, in_features, out_features, options):
    weight, matrix = make(in_features, out_features, **options)
    layer = 2 if weight.stack else None
    x = inputs(rows, in_features, dtype)
    x = x / 64 if dtype == "float16" else x  # or products pass float16's largest number
    bias = jnp.asarray(np.random.default_rng(5).normal(0, 20, (*weight.stack, out_features)), dtype)
    chip = jax.devices()[0].device_kind

    def run(x, weight, layer, bias):
        return mosaic_gpu.run(x, weight, layer, bias, chip)

    got = jax.jit(run)(x, own_layout.prepack(weight), None if layer is None else jnp.int32(layer), bias)
    one = bias if layer is None else bias[layer]
    want = np.asarray(x, np.float64) @ (matrix if layer is None else matrix[layer]) + np.asarray(one, np.float64)
    assert np.isfinite(np.asarray(got, np.float32)).all()
    assert error(got, want) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("warpgroups", [1, 2, 3, 4])
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize("scale_sums", [False, True])
def test_forms_of_large_on_card(warpgroups, splits, scale_sums):
    weight, matrix = make(2048, 1028)
    x = inputs(64, 2048)
    tiling = large.Tiling(warpgroups, 64, splits, 6, scale_sums)
    run = jax.jit(lambda x, weight: mosaic_gpu.run(x, weight, None, None, CHIP, tiling=tiling))
    assert error(run(x, own_layout.prepack(weight)), np.asarray(x, np.float64) @ matrix) < LIMIT


@pytest.mark.gpu
def test_sums_that_cancel_are_kept_in_float32():
    """FIELD_REPORTS F10: +1 in the first half of the rows, −1 in the second, every x 64, in float16."""
    q = np.full((4096, 128), 15)
    q[2048:] = 1
    weight = layout.from_integers(q, np.full((32, 128), 1 / 7, np.float16), bits=4, group_size=128)
    packed, chip = own_layout.prepack(weight), jax.devices()[0].device_kind
    run = jax.jit(lambda x, weight: mosaic_gpu.run(x, weight, None, None, chip))
    x = inputs(256, 4096, "float16")
    alone = np.asarray(run(x[:1], packed), np.float64)
    for rows in (1, 8, 16, 64, 256):
        assert np.abs(np.asarray(run(jnp.full((rows, 4096), 64, jnp.float16), packed), np.float64)).max() <= 1e-2
        assert error(np.asarray(run(x[:rows], packed), np.float64)[:1], alone) <= 1e-3

"""The Hopper matmul's inline code, instruction by instruction on a NumPy emulation of a warpgroup, against float64.

Here is what the GPU interpreter cannot run: masks, exact casts, zero-points through sums, fragments, ldmatrix, mma.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import layout, reference
from pallas_kernels.quantized_matmul import layout_mosaic_gpu as own_layout
from pallas_kernels.quantized_matmul import mosaic_gpu_fragments as fragments
from pallas_kernels.quantized_matmul import mosaic_gpu_large_warp as large
from pallas_kernels.quantized_matmul import mosaic_gpu_small_warp as small
from tests.pallas_kernels import ptx_emulator as emulator

FLOATS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.fixture(autouse=True)
def on_the_emulator(monkeypatch):
    emulator.install(monkeypatch, fragments, small, large)


def make(in_features, bits, group_size, zeros, scale_dtype):
    """(weight in layout "mosaic_gpu" of 64 columns, its float64 matrix); all integers and zero-points occur."""
    rng = np.random.default_rng(bits + group_size)
    groups = -(-in_features // group_size)
    q = rng.integers(0, 2**bits, (in_features, 64))
    scales = (rng.random((groups, 64)) + 0.5).astype(FLOATS[scale_dtype])
    zero = rng.integers(0, 2**bits, (groups, 64)) if zeros else None
    weight = layout.from_integers(q, scales, zero, bits=bits, group_size=group_size)
    return own_layout.prepack(weight), reference.dequantize(weight)


def rows_padded(x):
    """x's rows as they come one by one: 16 bytes of nothing after each."""
    return np.pad(x, ((0, 0), (0, small.X_PADDING)))


def tiles_swizzled(x):
    """x as TMA lays it out: 8 x 64 tiles, 16-byte piece p of row r at place p ^ r."""
    rows = -(-len(x) // 8) * 8
    x = np.pad(x, ((0, rows - len(x)), (0, 0)))
    pieces = x.reshape(rows // 8, 8, -1, 8, 8).transpose(0, 2, 1, 3, 4)  # row tile, column tile, row, piece, element
    moved = np.empty_like(pieces)
    for row in range(8):
        for piece in range(8):
            moved[:, :, row, piece ^ row] = pieces[:, :, row, piece]
    return moved


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("rows", "bits", "group_size", "zeros", "scale_dtype", "stage"),
    [
        (1, 4, 128, False, "bfloat16", 0),
        (3, 4, 128, True, "float16", 0),
        (8, 4, 64, True, "float32", 0),
        (16, 4, 32, False, "float16", 0),
        (5, 4, 384, True, "bfloat16", 1),
        (2, 8, 128, False, "float16", 0),
        (8, 8, 32, True, "bfloat16", 0),
        (11, 8, 1536, True, "float32", 2),
    ],
)
def test_a_stage_of_few_rows(dtype, rows, bits, group_size, zeros, scale_dtype, stage):
    in_features = 1536
    weight, matrix = make(in_features, bits, group_size, zeros, scale_dtype)
    problem = small.Problem(
        rows, in_features, 64, bits, group_size, False, None, dtype, scale_dtype, not zeros, None, False, 4,
        small.Tiling(4, 1, 1),
    )  # fmt: skip
    x = np.random.default_rng(rows).normal(0.5, 1, (rows, 512)).astype(FLOATS[dtype])
    first = stage * 512 // group_size
    groups = slice(first, first + problem.group_rows)
    refs = {
        "packed_smem": emulator.put(np.asarray(weight.packed)[4 * stage : 4 * stage + 4], 0),
        "x_smem": emulator.put(tiles_swizzled(x) if problem.x_tiled else rows_padded(x), 1 << 16),
        "scales_smem": emulator.put(np.asarray(weight.scales)[groups], 1 << 17),
    }
    if zeros:
        refs["zeros_smem"] = emulator.put(np.asarray(weight.zeros)[groups], (1 << 17) + (1 << 16))
    nothing = [[np.zeros(128, np.float32)] * 4 for _ in range(4 * problem.row_tiles)]
    lane, warp = fragments.lane_and_warp()
    sums = small._warp_products(problem, refs, fragments.i32(stage), lane, warp, nothing)
    got = np.zeros((problem.row_tiles * 8, 64))
    g, t = emulator.LANE // 4, emulator.LANE % 4
    for number, tile in enumerate(sums):
        strip, row_tile = divmod(number, problem.row_tiles)
        for index, value in enumerate(tile):
            high, odd = divmod(index, 2)
            np.add.at(got, (8 * row_tile + 2 * t + odd, 16 * strip + g + 8 * high), value)
    want = x.astype(np.float64) @ matrix[512 * stage : 512 * stage + 512]
    assert np.linalg.norm(got[:rows] - want) / np.linalg.norm(want) < 2e-5  # float32 sums around an offset of 136


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale_sums", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "zeros"), [(4, 128, False), (4, 64, True), (4, 32, True), (8, 128, True), (8, 64, False)]
)
def test_wgmma_operand(dtype, scale_sums, bits, group_size, zeros):
    if scale_sums and group_size == 32:
        pytest.skip("weights are scaled where groups are smaller than a tile of x")
    weight, matrix = make(128, bits, group_size, zeros, "float16")
    problem = large.Problem(
        64, 128, 64, bits, group_size, False, None, dtype, "float16", not zeros, None, False, 4,
        large.Tiling(1, 64, 1, 2, scale_sums),
    )  # fmt: skip
    named = {"packed": emulator.put(np.asarray(weight.packed)[0], 0)}
    if not scale_sums:
        named["scales"] = emulator.put(np.asarray(weight.scales), 1 << 16)
    if zeros:
        named["zeros"] = emulator.put(np.asarray(weight.zeros), 1 << 17)
    got = np.zeros((128, 64))
    g, t = emulator.LANE // 4, emulator.LANE % 4
    depth = 128 // large.PIECES
    for piece in range(large.PIECES):
        for number, word in enumerate(large.cast_words(problem, named, piece)):
            step, register = divmod(number, 4)
            pairs = emulator._halves(word, {"bfloat16": "bf16", "float16": "f16"}[dtype]).astype(np.float64)
            for odd in (0, 1):
                row = piece * depth + 16 * step + 8 * (register // 2) + 2 * t + odd
                got[row, 16 * emulator.WARP + g + 8 * (register % 2)] = pairs[:, odd]
    if scale_sums:
        scales = np.repeat(np.asarray(weight.scales, np.float64), group_size, 0)[:128]
        np.testing.assert_array_equal(got, np.round(matrix / scales))
    else:
        assert np.linalg.norm(got - matrix) / np.linalg.norm(matrix) < 2 * float(jnp.finfo(dtype).eps)


def test_the_emulator_notices_a_wrong_register(monkeypatch):
    original = fragments.encoded
    monkeypatch.setattr(fragments, "encoded", lambda *arguments: original(*arguments)[::-1])
    with pytest.raises(AssertionError):
        test_a_stage_of_few_rows("bfloat16", 1, 4, 128, False, "bfloat16", 0)

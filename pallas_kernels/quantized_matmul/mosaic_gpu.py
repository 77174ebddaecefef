"""Quantized matmul on Hopper GPUs (Mosaic GPU): which of two kernels runs, and with what tiling.

Up to `mosaic_gpu_small.MAX_ROWS` rows of x: `mosaic_gpu_small`, at the speed of memory. More: `mosaic_gpu_large`, for
few hundred rows with the matrix's rows split over a cluster. float32 x: one layer at a time dequantized for XLA's dot,
for tensor cores have no exact form of it. Tilings come from `tuned/<chip>.json` (measured) or are computed from the
shape; `form` says which.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chip import HOPPER, is_hopper
from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu_tuned
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.stack import one_bias
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

LAYOUT = layout.LAYOUT
TAKES_STACKED_BIAS = True
prepack = layout.prepack
unpack = layout.unpack

MULTIPROCESSORS = 132
# Blocks that run at once by a cluster's size, larger ones still fewer: a GPC has 16 or 18 multiprocessors, or fewer.
CLUSTERED = {1: 132, 2: 132, 3: 108, 4: 112}
SHARED_BYTES = 227 * 1024
SMALL_ROWS = 16
_TUNED = pathlib.Path(__file__).parent / "tuned"


@functools.cache
def _kernels():
    """(small, large). Mosaic GPU takes 0.6 s to import: only where a GPU runs it."""
    from pallas_kernels.quantized_matmul import mosaic_gpu_large, mosaic_gpu_small

    return mosaic_gpu_small, mosaic_gpu_large


def unsupported(shape: MatmulShape, chip: str) -> str | None:
    """None, or why this kernel cannot run `shape` on `chip`."""
    if not is_hopper(chip):  # wgmma with this register layout exists there alone
        return f"it needs a Hopper GPU ({', '.join(HOPPER)})"
    if shape.bits not in (4, 8):
        return f"it takes 4 or 8 bits, not {shape.bits}"
    if not (shape.group_size in (32, 64) or shape.group_size % 128 == 0 or shape.group_size >= shape.in_features):
        return f"it takes groups of 32, 64, a multiple of 128 or all rows, not {shape.group_size}"
    if shape.layout != LAYOUT:
        return f"it reads layout {LAYOUT!r}, not {shape.layout!r}: prepack the weight"
    return None


def form(shape: MatmulShape, chip: str) -> str:
    """How `run` computes `shape` on `chip`."""
    small, _ = _kernels()
    if shape.dtype == "float32":
        return "a layer at a time dequantized for a float32 dot"
    tiling, origin = choose_tiling(shape, chip)
    kind = "columns whole in a block" if isinstance(tiling, small.Tiling) else "wgmma, weights from registers"
    return f"{kind}, {tiling}, {origin}"


def run(
    x_MI: jax.Array, weight: QuantizedTensor, layer, bias, chip: str, *, portable: bool = False, tiling=None
) -> jax.Array:
    """[M, O] in x's dtype; x's columns are already in the order of the stored rows.

    Args:
        x_MI: [M, in].
        weight: in layout "mosaic_gpu".
        layer: None, or which matrix of a stack; a traced index was measured to be as fast as an int.
        bias: [out] or [layers, out], added in float32, or None.
        chip: device kind.
        portable: plain operations in place of those that the GPU interpreter cannot run.
        tiling: a tiling of `mosaic_gpu_small` or `mosaic_gpu_large` in place of the chosen one.
    """
    small, large = _kernels()
    dtype = jnp.dtype(x_MI.dtype).name
    if dtype == "float32":
        result_MO = jnp.dot(x_MI, dequantize(weight, layer), precision=lax.Precision.HIGHEST)
        bias_O = one_bias(bias, layer)
        return result_MO if bias_O is None else result_MO + bias_O.astype(jnp.float32)
    if tiling is None:
        shape = MatmulShape(
            rows=x_MI.shape[0],
            in_features=weight.in_features,
            out_features=weight.out_features,
            bits=weight.bits,
            group_size=weight.group_size,
            zeros=weight.zeros is not None,
            dtype=dtype,
            layout=weight.layout,
        )
        tiling, _ = choose_tiling(shape, chip)
    kernel = small if isinstance(tiling, small.Tiling) else large
    return kernel.call(x_MI, weight, layer, bias, tiling=tiling, portable=portable)


def dequantize(weight: QuantizedTensor, layer) -> jax.Array:
    """[in, out] of one layer in float32, rows in their stored order."""

    def take(array):
        return array if layer is None else lax.dynamic_index_in_dim(jnp.asarray(array), layer, 0, keepdims=False)

    rows, columns = weight.in_features, weight.out_features
    values = layout.integers(take(weight.packed), weight.bits)[:rows, :columns].astype(jnp.float32)
    group = jnp.arange(rows) // weight.group_size
    zeros = float(2 ** (weight.bits - 1))
    if weight.zeros is not None:
        zeros = take(weight.zeros)[group, :columns].astype(jnp.float32)
    return (values - zeros) * take(weight.scales)[group, :columns].astype(jnp.float32)


def choose_tiling(shape: MatmulShape, chip: str) -> tuple[Any, str]:
    """The tiling for a shape, and where it comes from ("tuned" or "computed")."""
    return _choose_tiling(shape.rows, shape.in_features, shape.out_features, shape.bits, shape.group_size, chip)


@functools.lru_cache(maxsize=4096)
def _choose_tiling(rows: int, in_features: int, out_features: int, bits: int, group_size: int, chip: str):
    entries = tuned(chip).get(mosaic_gpu_tuned.key(bits, in_features, out_features), {})
    # An entry holds for its rows and down to half as many.
    for limit in sorted(map(int, entries)):
        if limit / 2 < rows <= limit:
            tiling = tiling_of(entries[str(limit)]["tiling"])
            # Tuned in groups of 128; smaller ones have more scales, for which a block may have no room.
            if fits(tiling, rows, in_features, out_features, bits, group_size):
                return tiling, "tuned"
    return computed_tiling(rows, in_features, out_features, bits, group_size), "computed"


def tiling_of(values) -> Any:
    """A tiling from a table's list: three numbers for few rows, more for many."""
    small, large = _kernels()
    return small.Tiling(*values) if len(values) == 3 else large.Tiling(*values)


@functools.cache
def tuned(chip: str) -> dict:
    """The measured tilings of a chip: "4 bits, in x out" → rows → {"tiling", "us"}; empty for an unknown chip.

    Raises:
        ValueError: the table is damaged, or names a tiling that does not fit the chip.
    """
    path = tuned_path(chip)
    entries = mosaic_gpu_tuned.read(path) if path.is_file() else {}
    for name, rows in entries.items():
        for count, entry in rows.items():
            sizes = mosaic_gpu_tuned.sizes(name)
            if not fits(tiling_of(entry["tiling"]), int(count), *sizes[1:], sizes[0], 128):
                raise ValueError(
                    f"{path}: {name}, {count} rows: the tiling {entry['tiling']} does not fit a block. "
                    "Delete the entry, or make it again with qwen-jax bench tune."
                )
    return entries


def tuned_path(chip: str) -> pathlib.Path:
    """Where the table of a chip lies."""
    return _TUNED / f"{chip.replace(' ', '_')}.json"


def computed_tiling(rows: int, in_features: int, out_features: int, bits: int, group_size: int):
    """A tiling from the shape alone: one wave of blocks, as many stages in flight as shared memory holds."""
    small, large = _kernels()
    strips = -(-out_features // layout.PADDING) * (layout.PADDING // layout.STRIP)
    shape = (rows, in_features, out_features, bits, group_size)
    if rows <= SMALL_ROWS:
        stages = -(-layout.chunks(in_features) // small.WARPS)
        most = -(-strips // MULTIPROCESSORS)
        blocks = 2 if most > 8 else 1  # of a multiprocessor: shorter last stages
        for count in range(-(-most // blocks), 0, -1):
            for warpgroups in (4, 2, 1) if count <= 2 and stages >= 12 else (2, 1):
                ring = min(3, -(-stages // warpgroups))
                for slots in range(ring, 0, -1):
                    tiling = small.Tiling(count, min(warpgroups, stages), slots)
                    if fits(tiling, *shape, SHARED_BYTES // blocks - 1024) and (slots > 1 or slots == ring):
                        return tiling
        return small.Tiling(1, 1, 1)
    for candidate in large_candidates(rows, in_features, out_features):
        if (tiling := deepest(*candidate, candidate[1] <= 64, shape)) is not None:
            return tiling
    return large.Tiling(1, 64, 1, 2, True)


def deepest(warpgroups: int, tile: int, splits: int, scale_sums: bool, shape: tuple[int, ...]):
    """The tiling of `mosaic_gpu_large` with as many slots as shared memory holds, or None; `shape` as of `fits`."""
    _, large = _kernels()
    tilings = (large.Tiling(warpgroups, tile, splits, slots, scale_sums) for slots in range(8, 1, -1))
    return next((tiling for tiling in tilings if fits(tiling, *shape)), None)


def large_candidates(rows: int, in_features: int, out_features: int) -> list[tuple[int, int, int]]:
    """(warpgroups, rows, splits) of `mosaic_gpu_large.Tiling` that a block's registers hold, best by `cycles` first."""
    _, large = _kernels()
    least = 64 if rows <= 512 else 128
    tiles = {-(-rows // (8 * parts)) * 8 for parts in range(-(-rows // 256), -(-rows // least) + 1)}
    candidates = [
        (warpgroups, tile, splits)
        for warpgroups, most in large.fast_form.MOST_ROWS.items()
        for tile in tiles
        for splits in CLUSTERED
        if tile <= (most if splits == 1 else min(most, 128))
    ]
    return sorted(candidates, key=lambda candidate: cycles(candidate, rows, in_features, out_features))


def cycles(candidate: tuple[int, int, int], rows: int, in_features: int, out_features: int) -> float:
    """Estimated time of `mosaic_gpu_large` in cycles; fitted to 100 tilings on an H200, mostly within a tenth."""
    _, large = _kernels()
    warpgroups, tile, splits = candidate
    blocks = -(-out_features // (large.fast_form.FEATURES * warpgroups)) * -(-rows // tile) * splits
    waves = -(-blocks // CLUSTERED[splits])
    # wgmma takes 4 cycles a row of x. Few rows: the instructions that make operands count, of all warpgroups.
    few = max(380, (241 + 2.2 * tile) * warpgroups + 7.1 * tile - 215)
    chunk = few if tile <= 64 else 4 * tile * warpgroups + 400
    return waves * (-(-layout.chunks(in_features) // splits) * chunk + 535 + 2679 * (splits > 1))


def fits(tiling, rows: int, in_features: int, out_features: int, bits: int, group_size: int, limit=SHARED_BYTES):
    """Whether a block's shared memory suffices, zero-points and 16-bit scales counted."""
    small, large = _kernels()
    strips = -(-out_features // layout.PADDING) * (layout.PADDING // layout.STRIP)
    common = (rows, in_features, out_features, bits, group_size, False, None, "bfloat16", "bfloat16", False)
    common += (None, False)
    if isinstance(tiling, small.Tiling):
        return small.fast_form.shared_bytes(small.Problem(*common, strips, tiling)) <= limit
    tiling = large.fitted(tiling, strips, layout.chunks(in_features), group_size)
    return large.staging_fits(tiling) and large.fast_form.shared_bytes(large.Problem(*common, strips, tiling)) <= limit

"""The product with the transposed weight, which training needs: the derivative of `quantized_matmul` for its input.

Rows of the weight are dequantized a tile at a time, so that a tile of floats is all that is in memory beside the packed
words; each tile gives its own inputs' derivatives by one large dot, which is bound by arithmetic, not by the weight's
bytes: training has thousands of rows. A weight in a kernel's own layout is first put back into GPTQ's words, still
packed, one layer at a time.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

TILE_BYTES = 2**26  # of dequantized floats at a time
UNIT = 32  # rows that fill whole words, for every number of bits


def run(
    g_MO: jax.Array,
    weight: QuantizedTensor,
    layer,
    *,
    unpack: Callable[[QuantizedTensor], QuantizedTensor],
    chip: str,
    tile_bytes: int = TILE_BYTES,
) -> jax.Array:
    """Σₒ g[m, o] · w[i, o], [M, in] in the dtype of g, inputs in their own order; sums in float32.

    Args:
        g_MO: [M, O].
        weight: any layout.
        layer: index into its stack, None without one.
        unpack: puts a weight back into layout "gptq".
        chip: `device_kind` of the device it will run on.
        tile_bytes: of dequantized floats at a time.
    """
    weight = unpack(_one(weight, layer))
    dtype = jnp.float32 if chip == "cpu" else g_MO.dtype
    tile = tile_rows(weight, jnp.dtype(dtype).itemsize, tile_bytes)
    aligned = tile % weight.group_size == 0
    out_dtype, g_MO = g_MO.dtype, g_MO.astype(dtype)

    def part(start, rows: int):
        weight_IO = xla.dequantize(_rows(weight, start, rows, aligned), None, dtype, narrow=chip != "cpu")
        return lax.dot_general(
            g_MO,
            weight_IO,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    full, parts = weight.in_features // tile, []
    if full > 1:
        tiles_tMI = lax.map(lambda start: part(start, tile), jnp.arange(full, dtype=jnp.int32) * tile)
        parts.append(jnp.moveaxis(tiles_tMI, 0, 1).reshape(g_MO.shape[0], full * tile))
    elif full:
        parts.append(part(0, tile))
    if rest := weight.in_features - full * tile:
        parts.append(part(full * tile, rest))
    dx_MI = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    if weight.permutation is not None:  # stored row r multiplies input permutation[r]
        places = jnp.arange(weight.in_features, dtype=jnp.int32)
        dx_MI = dx_MI[:, jnp.zeros_like(places).at[weight.permutation].set(places)]
    return dx_MI.astype(out_dtype)


def tile_rows(weight: QuantizedTensor, itemsize: int, tile_bytes: int) -> int:
    """Rows of a tile: whole words and, where the budget allows, whole groups."""
    most = max(tile_bytes // (itemsize * weight.out_features), UNIT)
    unit = UNIT if weight.groups == 1 else math.lcm(UNIT, weight.group_size)
    unit = unit if unit <= most else UNIT
    return most // unit * unit


def _rows(weight: QuantizedTensor, start, rows: int, aligned: bool) -> QuantizedTensor:
    """Stored rows start … start + rows − 1 as a weight of its own.

    `start` is a multiple of `UNIT` and, if `aligned`, of the group size.
    """

    def cut(array, first, count):
        return None if array is None else lax.dynamic_slice_in_dim(array, first, count, 0)

    words = -(-rows * weight.bits // 32)
    packed = lax.dynamic_slice_in_dim(weight.packed, start * weight.bits // 32, words, 0)
    if weight.groups == 1:
        parts, size = (weight.scales, weight.zeros), rows
    elif aligned:
        size = weight.group_size
        parts = tuple(cut(array, start // size, -(-rows // size)) for array in (weight.scales, weight.zeros))
    else:
        size, group_I = 1, (start + jnp.arange(rows, dtype=jnp.int32)) // weight.group_size
        parts = tuple(None if array is None else array[group_I] for array in (weight.scales, weight.zeros))
    scales, zeros = parts
    return QuantizedTensor(packed, scales, zeros, None, weight.bits, size, rows)


def _one(weight: QuantizedTensor, layer) -> QuantizedTensor:
    weight = jax.tree.map(jnp.asarray, weight)
    if layer is None:
        return weight
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, layer, 0, keepdims=False), weight)

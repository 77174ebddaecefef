"""Quantized matmul on TPUs in Pallas Mosaic TPU: the file's own words, read once; few rows or many.

The layout "mosaic_tpu" is "gptq" with the same words. Float16 scales, which Mosaic does not take, are kept as int16,
bit for bit, and rows are padded to whole tiles. Layout "gptq" runs too; float16 scales of a layer are then converted
before every call.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import tpu
from pallas_kernels.quantized_matmul import mosaic_tpu_few as few
from pallas_kernels.quantized_matmul import mosaic_tpu_many as many
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

LAYOUT = "mosaic_tpu"
FEW_ROWS = 64  # from here on dequantizing costs less than correcting the products of every group
MOST_SLOTS = 32  # groups that may meet in a tile


def unsupported(shape: MatmulShape, chip: str) -> str | None:
    """None, or why this kernel cannot run `shape` on `chip`."""
    if reason := tpu.refusal(chip):
        return reason
    if shape.bits not in (4, 8):
        return f"it reads 4 and 8 bits, not {shape.bits}"
    if shape.layout not in ("gptq", LAYOUT):
        return f"it reads layouts 'gptq' and {LAYOUT!r}, not {shape.layout!r}"
    slots = few.few_tiles(shape.in_features, shape.bits, shape.group_size, chip).slots
    if slots > MOST_SLOTS:
        return f"{slots} groups of {shape.group_size} rows meet in a tile, more than {MOST_SLOTS}"
    return None


def form(shape: MatmulShape, chip: str) -> str:
    """How `run` computes `shape` on `chip`."""
    if _few(shape.rows, shape.dtype):
        depth = few.few_tiles(shape.in_features, shape.bits, shape.group_size, chip).rows
        passes = -(-shape.rows // FEW_ROWS)
        again = f", the weight read {passes} times" if passes > 1 else ""
        return f"packed words to the matrix unit, tiles of {depth} rows, scales on the sums{again}"
    return "dequantized to bfloat16 in VMEM, a block at a time"


def _few(rows: int, dtype: str) -> bool:
    # Many rows of float32 or float16 are rare (all logits of an 8-bit head) and want their precision.
    return rows <= FEW_ROWS or dtype != "bfloat16"


def run(x_MI: jax.Array, weight: QuantizedTensor, layer, bias_O, chip: str) -> jax.Array:
    """[M, O] in x's dtype; x's columns are already in the order of the stored rows."""
    as_few = _few(x_MI.shape[0], x_MI.dtype.name)
    if as_few:
        cut = few.few_tiles(weight.in_features, weight.bits, weight.group_size, chip)
    else:
        cut = many.many_tiles(weight.in_features, weight.group_size)
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)

    def vectors(array):
        """[layers or 1, groups, out], one layer alone where it has to be made anew, and which of its layers to read."""
        if array is None:
            return None, index
        array = array if weight.stack else array[None]
        anew = array.dtype == jnp.float16 or not cut.regular
        if not anew:
            return array, index
        array = lax.dynamic_index_in_dim(array, index, 0)
        array = array.astype(jnp.float32) if array.dtype == jnp.float16 else array
        return (array if cut.regular else array[:, cut.gather()]), jnp.int32(0)

    scales, at = vectors(weight.scales)
    zeros, zeros_at = vectors(weight.zeros)
    if zeros is not None and zeros.shape[0] != scales.shape[0]:  # one of them alone: as the other
        zeros = lax.dynamic_index_in_dim(zeros, zeros_at, 0)
    layers = jnp.stack([index, at])
    if as_few:
        chunk = min(x_MI.shape[0], FEW_ROWS)
        return few.run(x_MI, weight, scales, zeros, layers, bias_O, chip, chunk)
    return many.run(x_MI, weight, scales, zeros, layers, bias_O, chip)


def prepack(weight: QuantizedTensor) -> QuantizedTensor:
    """From layout "gptq": float16 scales as int16, rows of every array padded with zeros to a multiple of 8."""
    return dataclasses.replace(
        weight,
        packed=_pad_rows(weight.packed),
        scales=_pad_rows(_reinterpret(weight.scales, "float16", "int16")),
        zeros=None if weight.zeros is None else _pad_rows(weight.zeros),
        layout=LAYOUT,
    )


def unpack(weight: QuantizedTensor) -> QuantizedTensor:
    """The inverse of `prepack`."""
    words = -(-weight.in_features * weight.bits // 32)
    return dataclasses.replace(
        weight,
        packed=weight.packed[..., :words, :],
        scales=_reinterpret(weight.scales[..., : weight.groups, :], "int16", "float16"),
        zeros=None if weight.zeros is None else weight.zeros[..., : weight.groups, :],
        layout="gptq",
    )


def _pad_rows(array):
    # XLA lays a stack out so that the least is padded: rows that do not fill tiles of 8 would be moved behind the
    # layers, and the whole stack copied back in every program.
    padding = -array.shape[-2] % 8
    if not padding:
        return array
    pad = np.pad if isinstance(array, np.ndarray) else jnp.pad
    return pad(array, ((0, 0),) * (array.ndim - 2) + ((0, padding), (0, 0)))


def _reinterpret(array, old: str, new: str):
    if array.dtype != old:
        return array
    return array.view(new) if isinstance(array, np.ndarray) else lax.bitcast_convert_type(array, jnp.dtype(new))

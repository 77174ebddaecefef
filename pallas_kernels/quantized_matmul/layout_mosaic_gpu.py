"""Layout "mosaic_gpu": packed integers in the order in which a warp's lanes hold a tensor-core operand.

The unit is 16 columns (a *strip*) by 128 rows (a *chunk*) of the matrix: what one warp multiplies as operand A of eight
16 × 16 steps, columns of the matrix being A's rows. Lane 4g + t of a warp holds, of each step, columns g and g + 8 and
rows 2t, 2t + 1, 2t + 8, 2t + 9 (PTX ISA, "Matrix Fragments for mma.m16n8k16"; wgmma's four warps do the same with four
strips). A lane reads 16 bytes at a time and a warp 512 contiguous ones, so shared memory is read without conflicts, and
a chunk of any number of neighbouring strips is one contiguous piece of memory, copied without a tensor map.

- packed: int32 [*stack, chunks, strips, 64 · bits]; word order inside a unit: see `_ORDER`. q is stored as it is.
- scales, zeros: [*stack, groups, out] as before, padded to 64 columns and whole chunks of groups.
Padding holds zeros; `out_padding` of the tensor counts the padded columns.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

LAYOUT = "mosaic_gpu"
CHUNK = 128
STRIP = 16
PADDING = 64  # columns are padded to whole warpgroups of strips

# A unit's rows are (half, step, high, lane t, pair) and its columns (high column, lane g); a field of a word is one q.
#   4 bits: 2 halves of 4 steps, a word is one lane's share of one step: fields (pair, high, high column).
#   8 bits: 4 halves of 2 steps, two words (high) a step: fields (pair, high column).
# Fields 0–3 of a 4-bit word and bytes 0–1 of an 8-bit word are the low 16-bit halves of operand registers.
_ROWS = {4: (2, 4, 2, 4, 2), 8: (4, 2, 2, 4, 2)}
#         chunk strip half g  t  step pair high highcol      chunk strip half g  t  step high pair highcol
_ORDER = {4: (0, 6, 1, 8, 4, 2, 5, 3, 7), 8: (0, 6, 1, 8, 4, 2, 3, 5, 7)}


def chunks(in_features: int) -> int:
    """Chunks of 128 rows."""
    return -(-in_features // CHUNK)


def groups_per_chunk(group_size: int) -> int:
    """Groups whose scales one chunk needs: 1, 2 or 4."""
    return max(1, CHUNK // group_size)


def prepack(weight: QuantizedTensor) -> QuantizedTensor:
    """The same weight (layout "gptq", 4 or 8 bits, groups of 32, 64 or a multiple of 128, or one group)."""
    if weight.layout != "gptq" or weight.bits not in _ROWS:
        raise ValueError(
            f"prepack takes 4 or 8 bits in layout 'gptq', got {weight.bits} bits in layout {weight.layout!r}."
        )
    padding = -weight.out_features % PADDING
    per_chunk = groups_per_chunk(weight.group_size)
    rows = chunks(weight.in_features) * per_chunk if per_chunk > 1 else weight.groups

    def pad(array):
        if array is None:
            return None
        widths = ((0, 0),) * len(weight.stack) + ((0, rows - weight.groups), (0, padding))
        return np.pad(array, widths) if isinstance(array, np.ndarray) else jnp.pad(array, widths)

    packed = _each_layer(functools.partial(_pack, bits=weight.bits, rows=weight.in_features), weight)
    return QuantizedTensor(
        packed,
        pad(weight.scales),
        pad(weight.zeros),
        weight.permutation,
        weight.bits,
        weight.group_size,
        weight.in_features,
        LAYOUT,
        padding,
    )


def unpack(weight: QuantizedTensor) -> QuantizedTensor:
    """The inverse of `prepack`, exact."""
    if weight.layout != LAYOUT:
        raise ValueError(f"unpack takes layout {LAYOUT!r}, got {weight.layout!r}.")
    columns = weight.out_features
    packed = _each_layer(functools.partial(_unpack, bits=weight.bits, rows=weight.in_features, columns=columns), weight)

    def trim(array):
        return None if array is None else array[..., : weight.groups, :columns]

    return QuantizedTensor(
        packed,
        trim(weight.scales),
        trim(weight.zeros),
        weight.permutation,
        weight.bits,
        weight.group_size,
        weight.in_features,
    )


def integers(packed, bits: int) -> jax.Array:
    """q of any number of units, uint8 [chunks · 128, strips · 16], from int32 [chunks, strips, 64 · bits]."""
    count, strips, _ = packed.shape
    shifts = jnp.arange(32 // bits, dtype=jnp.int32) * bits
    fields = lax.shift_right_logical(packed[..., None], jnp.broadcast_to(shifts, (*packed.shape, 32 // bits)))
    sizes = (count, *_ROWS[bits], strips, 2, 8)
    order = _ORDER[bits]
    fields = (fields & (2**bits - 1)).astype(jnp.uint8).reshape([sizes[axis] for axis in order])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return fields.transpose(inverse).reshape(count * CHUNK, strips * STRIP)


def _each_layer(function, weight: QuantizedTensor):
    """`function` of each matrix of `packed`. NumPy in, NumPy out: then one layer at a time is on the device."""
    packed, function = weight.packed, jax.jit(function)
    if isinstance(packed, np.ndarray):
        if not weight.stack:
            return np.asarray(function(packed))
        return np.stack([np.asarray(function(layer)) for layer in packed])
    return jax.jit(lambda array: lax.map(function, array))(packed) if weight.stack else function(packed)


def _pack(packed, *, bits: int, rows: int):
    """One matrix, from the words of layout "gptq"."""
    per_word, columns = 32 // bits, packed.shape[1]
    shifts = jnp.arange(per_word, dtype=jnp.int32)[:, None] * bits
    q_IO = lax.shift_right_logical(packed[:, None], jnp.broadcast_to(shifts, (packed.shape[0], per_word, columns)))
    q_IO = (q_IO & (2**bits - 1)).reshape(-1, columns)[:rows]
    count, strips = chunks(rows), -(-columns // PADDING) * PADDING // STRIP
    q_IO = jnp.pad(q_IO, ((0, count * CHUNK - rows), (0, strips * STRIP - columns)))
    fields = q_IO.reshape(count, *_ROWS[bits], strips, 2, 8).transpose(_ORDER[bits])
    return _words(fields.reshape(count, strips, -1, per_word), bits)


def _unpack(packed, *, bits: int, rows: int, columns: int):
    """One matrix, to the words of layout "gptq"."""
    per_word = 32 // bits
    q_IO = integers(packed, bits)[:rows, :columns].astype(jnp.int32)
    q_IO = jnp.pad(q_IO, ((0, -rows % per_word), (0, 0)))
    return _words(q_IO.reshape(-1, per_word, columns).swapaxes(1, 2), bits)


def _words(fields, bits: int):
    """int32 words from their fields, lowest first, along the last axis."""
    word = jnp.zeros(fields.shape[:-1], jnp.int32)
    for index in range(fields.shape[-1]):
        word = word | (fields[..., index] << (bits * index))
    return word

"""Quantized matmul in plain XLA: the kernel that takes every shape, on CPUs, older GPUs and as the last resort.

Four forms. On a CPU, for few rows, the file's own words are decoded in registers (`block_sums`); for many, one layer
at a time is dequantized to float32, the only type whose `dot` XLA does not copy first. On a GPU, for the fewest rows,
words are decoded inside a sum over the matrix's rows, which XLA makes one pass over them of (`_column_sums`). Elsewhere
the dequantization, from integers of the weight's own width, is left to XLA to fuse into a dot of x's type.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import block_sums
from pallas_kernels.chip import is_gpu
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

# Rows of the matrix that fill whole words: 8 of 4 bits in one, 32 of 3 bits in three.
UNITS = {2: 16, 3: 32, 4: 8, 8: 4}
# x rows up to which `_column_sums` runs on a GPU. One row of 4096 x 11008 on an H100, beside other work:
# 27 µs where the dot took 93. Were the words read again for every row, it would still be faster up to three.
SUM_ROWS = 3


def unsupported(shape: MatmulShape, chip: str) -> str | None:
    """None, or why this kernel cannot run `shape` on `chip`."""
    del chip
    if shape.layout != "gptq":
        return f"it reads layout 'gptq', not {shape.layout!r}"
    return None


def form(shape: MatmulShape, chip: str) -> str:
    """How `run` computes `shape` on `chip`."""
    if chip != "cpu":
        if _takes_sums(shape, shape.rows, chip):
            return "packed words decoded inside a sum over their rows"
        return f"dequantized inside a {shape.dtype} dot"
    if shape.rows <= block_sums.MAX_ROWS and _block_rows(shape):
        return "packed words decoded in registers"
    return "a layer at a time dequantized for a float32 dot"


def run(x_MI: jax.Array, weight: QuantizedTensor, layer, bias_O, chip: str) -> jax.Array:
    """[M, O] in x's dtype; x's columns are already in the order of the stored rows."""
    rows = _block_rows(weight)
    if _takes_sums(weight, x_MI.shape[0], chip):
        result_MO = _column_sums(x_MI.astype(jnp.float32), weight, layer)
    elif chip != "cpu":
        exact = x_MI.dtype == jnp.float32
        result_MO = jnp.dot(
            x_MI,
            dequantize(weight, layer, x_MI.dtype, narrow=True),
            precision=lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )
    elif x_MI.shape[0] <= block_sums.MAX_ROWS and rows:
        result_MO = _words(x_MI.astype(jnp.float32), weight, layer, rows)
    else:
        result_MO = x_MI.astype(jnp.float32) @ dequantize(weight, layer, jnp.float32, narrow=False)
    if bias_O is not None:
        result_MO = result_MO + bias_O.astype(jnp.float32)
    return result_MO.astype(x_MI.dtype)


def _block_rows(weight: MatmulShape | QuantizedTensor) -> int | None:
    """Rows of a block that share a scale and fill whole words, None if there is no such block."""
    return block_sums.block_rows(UNITS[weight.bits], weight.in_features, weight.group_size)


def _takes_sums(weight: MatmulShape | QuantizedTensor, rows: int, chip: str) -> bool:
    """Whether `_column_sums` runs: on a GPU, where a word lies in one group."""
    if not is_gpu(chip) or rows > SUM_ROWS or weight.bits == 3:
        return False
    fields = UNITS[weight.bits]
    return weight.in_features % fields == 0 and weight.group_size % fields == 0


def _of_parts(weight: QuantizedTensor, array, layer, rows: int):
    """float32 [in / rows, out]: each group's entry of `array` for every part of so many rows in it."""
    array = _layer(array, layer).astype(jnp.float32)
    wide = jnp.broadcast_to(array[:, None], (array.shape[0], weight.group_size // rows, array.shape[1]))
    return wide.reshape(-1, array.shape[1])[: weight.in_features // rows]


def _column_sums(x_MI, weight: QuantizedTensor, layer):
    """float32 [M, O]: Σ over words of scale · Σ over a word's fields of x · (q − zero)."""
    packed_WO = _layer(weight.packed, layer)
    fields, words = UNITS[weight.bits], weight.in_features // UNITS[weight.bits]
    zero = float(2 ** (weight.bits - 1)) if weight.zeros is None else _of_parts(weight, weight.zeros, layer, fields)
    mask, scale_WO = jnp.int32(2**weight.bits - 1), _of_parts(weight, weight.scales, layer, fields)
    values = [
        (lax.shift_right_logical(packed_WO, jnp.int32(field * weight.bits)) & mask).astype(jnp.float32) - zero
        for field in range(fields)
    ]
    x_MWF = x_MI.reshape(-1, words, fields)
    sums = []
    for row in range(x_MWF.shape[0]):  # one sum a row of x: XLA makes one loop of sums over the same words
        terms = [value_WO * x_MWF[row, :, field, None] for field, value_WO in enumerate(values)]
        while len(terms) > 1:  # in pairs: short chains of additions
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
        sums.append((terms[0] * scale_WO).sum(0))
    return jnp.stack(sums)


def _words(x_MI, weight: QuantizedTensor, layer, rows: int):
    """Σ over blocks of scale · (Σ x·q − zero · Σ x), q unsigned as stored."""
    bits = weight.bits
    start = np.arange(rows) * bits % 32
    # A field inside a word is masked where it lies and x divided by 2^start; one that reaches the sign bit, or crosses
    # into the next word, is shifted down.
    masked = start + bits < 32
    factors = np.where(masked, 2.0**-start, 1.0).astype(np.float32)

    def terms(load):
        for row in range(rows):
            word, shift = load(row * bits // 32), int(start[row])
            if masked[row]:
                field = word & jnp.int32((2**bits - 1) << shift)
            else:
                field = lax.shift_right_logical(word, jnp.int32(shift))
                if shift + bits > 32:
                    above = load(row * bits // 32 + 1) << (32 - shift)
                    field = (field | above) & (2**bits - 1)
            yield field.astype(jnp.float32)

    def of_blocks(array):
        return _of_parts(weight, array, layer, rows)[:, None]

    def finish(total_bMO, x_sum_bM1):
        zero = float(2 ** (bits - 1)) if weight.zeros is None else of_blocks(weight.zeros)
        return (total_bMO - zero * x_sum_bM1) * of_blocks(weight.scales)

    return block_sums.block_sums(x_MI, weight.packed, layer, rows, rows * bits // 32, factors, terms, finish)


def dequantize(weight: QuantizedTensor, layer, dtype, narrow: bool) -> jax.Array:
    """[in, out] of one layer, rows in their stored order: scale · (q − zero), computed in float32.

    `narrow`: 4- and 8-bit integers go through jnp.int4 and int8, which XLA on GPU and TPU fuses into a dot; on a CPU
    it would unpack them to memory first.
    """
    packed = _layer(weight.packed, layer)
    bits, groups, size = weight.bits, weight.groups, weight.group_size
    middle = 2 ** (bits - 1)
    fields = _narrow_fields(packed, bits) if narrow and bits in (4, 8) else _fields(packed, bits)
    q_IO = fields.reshape(-1, weight.out_features)[: weight.in_features]
    padding = groups * size - weight.in_features
    if padding:
        q_IO = jnp.pad(q_IO, ((0, padding), (0, 0)))
    values = q_IO.reshape(groups, size, -1).astype(jnp.float32)
    if weight.zeros is not None:
        values = values - (_layer(weight.zeros, layer).astype(jnp.float32) - middle)[:, None]
    weight_IO = values * _layer(weight.scales, layer).astype(jnp.float32)[:, None]
    return weight_IO.reshape(groups * size, -1)[: weight.in_features].astype(dtype)


def _narrow_fields(packed, bits: int):
    """q − 2^(bits − 1) as int4 or int8 [words, fields, out]: inverting a field's top bit makes it two's complement."""
    flipped = packed ^ jnp.int32(np.uint32(0x88888888 if bits == 4 else 0x80808080).view(np.int32))
    return jnp.swapaxes(lax.bitcast_convert_type(flipped, jnp.int4 if bits == 4 else jnp.int8), 1, 2)  # low field first


def _fields(packed, bits: int):
    """q − 2^(bits − 1) as int32 [bit streams of one word (3 bits: of three), fields, out]."""
    words = 3 if bits == 3 else 1
    padding = -packed.shape[0] % words
    if padding:
        packed = jnp.pad(packed, ((0, padding), (0, 0)))
    packed = packed.reshape(-1, words, packed.shape[1])
    start = np.arange(words * 32 // bits) * bits
    word, shift = start // 32, jnp.asarray(start % 32, jnp.int32)[:, None]
    source = packed[:, word] if words > 1 else packed
    shape = (packed.shape[0], len(start), packed.shape[2])
    fields = lax.shift_right_logical(jnp.broadcast_to(source, shape), jnp.broadcast_to(shift, shape))
    if words > 1:
        # A field that crosses into the next word; (w << 1) << (31 − s) is w << (32 − s) without a shift by 32.
        following = packed[:, np.minimum(word + 1, words - 1)]
        fields = fields | ((following << 1) << (31 - shift))
    return (fields & (2**bits - 1)) - 2 ** (bits - 1)


def _layer(array, layer):
    array = jnp.asarray(array)
    return array if layer is None else lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)

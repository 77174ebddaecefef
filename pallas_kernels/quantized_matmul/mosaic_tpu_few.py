"""Few rows of x on a TPU: packed words go to the matrix unit as bfloat16 128 + n, without a conversion.

A word of eight 4-bit fields, shifted by 4j and masked, is two halves; or-ing 0x4300 into each makes bfloat16 128 + n,
exactly, so that four shifts make a tile of the matrix unit. Each group's product is corrected by (128 + zero) · Σ x and
scaled in float32: no weight is rounded. An 8-bit weight is two 4-bit ones, low and high, that meet x and 16 · x.

- Grid: chunks of rows (one, while decoding), cores of the chip, blocks of columns. x stays in VMEM.
- The first block of a core brings x into the order of the tiles, by a product with a matrix of zeros and ones that also
  sums it. Groups that share a tile get rows of x of their own, zero elsewhere.
- float16 and float32 x become two and three bfloat16 rows whose sum they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.quantized_matmul.mosaic_tpu_layout import Tiles, divide, tiles
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

FIELDS = 8  # 4-bit fields of a word
PLANES = 4  # shifts that reach them, two fields at a time
HALVES = 0x43004300  # bfloat16 128 in both halves of a word
FIELD_OF_HALVES = 0x000F000F
OFFSET = 128.0
LANES = 128
PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}
BLOCK_BYTES = 2 << 20  # of packed words: large for the memory, small beside a matrix, whose first block nothing hides
COLUMNS = 256  # whose sums are in registers at once
UNROLL = 4


def few_tiles(in_features: int, bits: int, group_size: int, chip: str) -> Tiles:
    """Tiles of 128 rows, or as many 4-bit ones as the matrix unit is deep where that leaves none over."""
    depth = tpu.CHIPS[chip].mxu
    rows = depth if bits == 4 and in_features % depth == 0 else LANES
    return tiles(in_features, group_size, rows)


def block_columns(words: int, out_features: int, rows: int) -> int:
    """Columns of a block: 128 times a power of two, about `BLOCK_BYTES` of words, at least four blocks if possible."""
    wanted = min(BLOCK_BYTES // (4 * words), 1024 if rows <= 16 else 512, -(-out_features // 4))
    size = LANES
    while size * 2 <= wanted:
        size *= 2
    return size


def run(x_MI: jax.Array, weight: QuantizedTensor, scales, zeros, layer, bias_O, chip: str, chunk: int) -> jax.Array:
    """[M, O] in x's dtype.

    Args:
        x_MI: rows, columns in the order of the stored rows.
        weight: the matrix or stack.
        scales: [layers or 1, groups or gathered slots, out], int16 (bits of float16), bfloat16 or float32.
        zeros: likewise uint8, or None.
        layer: int32 [2]: which matrix of `weight.packed` and which of `scales`.
        bias_O: float32 or None.
        chip: `device_kind`.
        chunk: rows a pass over the weight: all of them or a multiple of 8.
    """
    rows, bits, out = x_MI.shape[0], weight.bits, weight.out_features
    cut = few_tiles(weight.in_features, bits, weight.group_size, chip)
    parts, slots = PARTS[x_MI.dtype.name], cut.slots
    x = x_MI.astype(jnp.float32) if x_MI.dtype == jnp.float16 else x_MI
    padding = cut.count * cut.rows - weight.in_features
    x = jnp.pad(x, ((0, 0), (0, padding))) if padding else x
    packed = weight.packed if weight.stack else weight.packed[None]
    depth = cut.rows * bits // 4
    words = cut.count * depth // FIELDS
    columns = block_columns(words, out, chunk)
    cores = tpu.CHIPS[chip].cores
    blocks = -(-out // columns)
    blocks_of_core = -(-blocks // cores)
    padded = -(-chunk // 8) * 8
    groups = scales.shape[1]

    def block(core, n):
        return jnp.minimum(core * blocks_of_core + n, blocks - 1)

    def vector(which):
        return lambda m, core, n, layer: (layer[which], 0, block(core, n))

    in_specs = [
        pl.BlockSpec((chunk, cut.count * cut.rows), lambda m, core, n, layer: (m, 0)),
        pl.BlockSpec((None, words, columns), vector(0)),
        pl.BlockSpec((None, groups, columns), vector(1)),
    ]
    operands = [x, packed, scales]
    scratch = [
        pltpu.VMEM((cut.count, slots * parts * padded, depth), jnp.bfloat16),
        pltpu.VMEM((cut.count, slots * padded, LANES), jnp.float32),
        pltpu.VMEM((groups, columns), jnp.float32),
    ]
    if zeros is not None:
        in_specs.append(pl.BlockSpec((None, groups, columns), vector(1)))
        operands.append(zeros)
        scratch.append(pltpu.VMEM((groups, columns), jnp.float32))
    if bias_O is not None:
        in_specs.append(pl.BlockSpec((1, columns), lambda m, core, n, layer: (0, block(core, n))))
        operands.append(bias_O.astype(jnp.float32)[None])
    chunks = -(-rows // chunk)
    weight_bytes = out * (words * 4 + groups * (scales.dtype.itemsize + (zeros is not None)))
    return pl.pallas_call(
        functools.partial(
            _body, cut=cut, bits=bits, parts=parts, has_zeros=zeros is not None, has_bias=bias_O is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(chunks, cores, blocks_of_core),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((chunk, columns), lambda m, core, n, layer: (m, block(core, n))),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, out), x_MI.dtype if x_MI.dtype != jnp.float16 else jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu.CHIPS[chip].vmem_bytes * 3 // 4,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * chunks * slots * parts * padded * cut.count * depth * out,
            bytes_accessed=chunks * weight_bytes + cores * x.nbytes + rows * out * x_MI.dtype.itemsize,
            transcendentals=0,
        ),
        name=f"quantized_matmul_{bits}bit_few",
    )(layer, *operands).astype(x_MI.dtype)


def _body(layer_ref, x_ref, packed_ref, scales_ref, *refs, cut: Tiles, bits, parts, has_zeros, has_bias):
    del layer_ref
    refs = list(refs)
    zeros_ref = refs.pop(0) if has_zeros else None
    bias_ref = refs.pop(0) if has_bias else None
    out_ref, ordered, sums, scale, *center = refs
    rows, columns = out_ref.shape
    padded = sums.shape[1] // cut.slots
    # Σ x · (128 + n) over the fields of a group is 128 · Σ x + Σ x · q; for 8 bits x stands for x and 16 · x.
    offset = OFFSET * (17 if bits == 8 else 1)

    @pl.when(pl.program_id(2) == 0)
    def _():
        _order(x_ref, ordered, sums, cut, bits, parts, padded)

    scale[...] = as_float(scales_ref[...])
    if has_zeros:
        center[0][...] = zeros_ref[...].astype(jnp.int32).astype(jnp.float32) + offset
    width = min(COLUMNS, columns)
    words = ordered.shape[2] // FIELDS

    def add_tile(tile, total, at):
        start = tile * words if isinstance(tile, int) else pl.multiple_of(tile * words, words)
        weight = _tile(packed_ref[pl.ds(start, words), at])
        product = jnp.dot(ordered[tile], weight, preferred_element_type=jnp.float32)
        for slot in range(cut.slots):
            group = cut.group_of(tile, slot)
            x_sum = jnp.concatenate([sums[tile, slot * padded : (slot + 1) * padded]] * (width // LANES), axis=1)
            middle = center[0][pl.ds(group, 1), at] if has_zeros else offset + 2 ** (bits - 1)
            first = slot * parts * padded
            exact = product[first : first + padded]
            for part in range(1, parts):
                exact = exact + product[first + part * padded : first + (part + 1) * padded]
            total = total + scale[pl.ds(group, 1), at] * (exact - middle * x_sum)
        return total

    for left in range(0, columns, width):
        at = slice(left, left + width)

        def add_tiles(turn, total, at=at):
            for step in range(UNROLL):
                total = add_tile(turn * UNROLL + step, total, at)
            return total

        total = lax.fori_loop(0, cut.count // UNROLL, add_tiles, jnp.zeros((padded, width), jnp.float32))
        for tile in range(cut.count // UNROLL * UNROLL, cut.count):
            total = add_tile(tile, total, at)
        total = total[:rows]
        if has_bias:
            total = total + bias_ref[:, at]
        out_ref[:, at] = total.astype(out_ref.dtype)


def _tile(words):
    """Bfloat16 [8 · words, columns] 128 + n: shift j brings fields j and 4 + j of word w to rows 2w and 2w + 1."""
    planes = [
        pltpu.bitcast((lax.shift_right_logical(words, 4 * plane) & FIELD_OF_HALVES) | HALVES, jnp.bfloat16)
        for plane in range(PLANES)
    ]
    return jnp.concatenate(planes, axis=0)


def _order(x_ref, ordered, sums, cut: Tiles, bits: int, parts: int, padded: int):
    """Fills `ordered` with x in the order of `_tile`, and `sums` with its sums, for every tile and slot."""
    depth, rows = ordered.shape[2], x_ref.shape[0]
    shape = (cut.rows, depth + LANES)
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    plane_size = depth // PLANES  # a power of two
    plane, inside = column >> (plane_size.bit_length() - 1), column & (plane_size - 1)
    field = ((inside >> 1) << 3) + ((inside & 1) << 2) + plane
    if bits == 4:
        chosen = jnp.where(field == row, 1.0, 0.0)
    else:  # fields 2r and 2r + 1 are the low and the high half of row r
        chosen = jnp.where((field >> 1) == row, jnp.where((field & 1) == 0, 1.0, 16.0), 0.0)
    chosen = jnp.where(column >= depth, 1.0, chosen).astype(jnp.bfloat16)

    def fill(tile, _):
        start = pl.multiple_of(tile * cut.rows, cut.rows)
        x_tile = x_ref[:, pl.ds(start, cut.rows)].astype(jnp.float32)
        place = lax.broadcasted_iota(jnp.int32, x_tile.shape, 1) + start
        first_group = divide(start, cut.group_size)
        for slot in range(cut.slots):
            rest = x_tile
            if cut.slots > 1:
                low = (first_group + slot) * cut.group_size
                rest = jnp.where((place >= low) & (place < low + cut.group_size), x_tile, 0.0)
            total = jnp.zeros((rows, LANES), jnp.float32)
            for part in range(parts):
                high = rest.astype(jnp.bfloat16)
                rest = rest - high.astype(jnp.float32)
                both = jnp.dot(high, chosen, preferred_element_type=jnp.float32)
                at = (slot * parts + part) * padded
                ordered[tile, at : at + rows] = both[:, :depth].astype(jnp.bfloat16)
                total = total + both[:, depth:]
            sums[tile, slot * padded : slot * padded + rows] = total
        return 0

    lax.fori_loop(0, cut.count, fill, 0)


def as_float(scales):
    """float32 of scales as they are stored; int16 holds the bits of float16."""
    if scales.dtype == jnp.int16:
        return tpu.float_of_half_bits(scales.astype(jnp.int32))
    return scales.astype(jnp.float32)

"""Many rows of bfloat16 x on a TPU: a block of the weight is dequantized once in VMEM and meets all rows there.

- Grid: chunks of up to 2048 rows, blocks of columns, blocks of the weight's rows, blocks of x's rows (innermost). The
  first block of x's rows finds the words just loaded and writes scale · (q − zero), rounded to bfloat16, to scratch.
- Every dot is as deep as the block; sums stay in VMEM in float32 until the last block of the weight's rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.quantized_matmul.mosaic_tpu_few import as_float
from pallas_kernels.quantized_matmul.mosaic_tpu_layout import Tiles, divide, tiles
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

TILE = 128  # rows of the weight whose scales are found at once
DEPTH_TILES = 43  # tiles of a block, at most
TOP_BITS = {4: -0x77777778, 8: -0x7F7F7F80}
CHUNK = 2048
BLOCK_ROWS = 256
COLUMNS = 256  # of a dot
LANES = 128


def many_tiles(in_features: int, group_size: int) -> Tiles:
    """Tiles of 128 rows, whatever the bits."""
    return tiles(in_features, group_size, TILE)


def run(x_MI: jax.Array, weight: QuantizedTensor, scales, zeros, layer, bias_O, chip: str) -> jax.Array:
    """[M, O] bfloat16; arguments as in `mosaic_tpu_few.run`."""
    rows, bits, out = x_MI.shape[0], weight.bits, weight.out_features
    fields = 32 // bits
    cut = many_tiles(weight.in_features, weight.group_size)
    block_tiles = _block_tiles(cut.count)
    depth_blocks = -(-cut.count // block_tiles)
    depth = block_tiles * TILE
    packed = weight.packed if weight.stack else weight.packed[None]
    columns = 1024 if out >= 8192 else 512 if out >= 512 else -(-out // LANES) * LANES
    chunk = min(CHUNK, -(-rows // 16) * 16)
    block_rows = min(BLOCK_ROWS, chunk)
    chunks, row_blocks = -(-rows // chunk), -(-chunk // block_rows)

    padding = depth_blocks * depth - weight.in_features
    x = jnp.pad(x_MI, ((0, 0), (0, padding))) if padding else x_MI  # rows of the weight beyond its end meet zeros

    def row_block(m, r):
        return jnp.minimum(m * row_blocks + r, -(-rows // block_rows) - 1)

    groups = scales.shape[1]
    in_specs = [
        pl.BlockSpec((block_rows, depth), lambda m, n, k, r, layer: (row_block(m, r), k)),
        pl.BlockSpec((None, depth // fields, columns), lambda m, n, k, r, layer: (layer[0], k, n)),
        pl.BlockSpec((None, groups, columns), lambda m, n, k, r, layer: (layer[1], 0, n)),
    ]
    operands = [x, packed, scales]
    scratch = [
        pltpu.VMEM((groups, columns), jnp.float32),
        pltpu.VMEM((depth, columns), jnp.bfloat16),
        pltpu.VMEM((row_blocks, block_rows, columns), jnp.float32),
    ]
    if zeros is not None:
        in_specs.append(pl.BlockSpec((None, groups, columns), lambda m, n, k, r, layer: (layer[1], 0, n)))
        operands.append(zeros)
        scratch.append(pltpu.VMEM((groups, columns), jnp.float32))
    if bias_O is not None:
        in_specs.append(pl.BlockSpec((1, columns), lambda m, n, k, r, layer: (0, n)))
        operands.append(bias_O.astype(jnp.float32)[None])

    def out_block(m, n, k, r, layer):
        # Until sums are complete the block stays the same, and is not written to memory.
        return row_block(m, jnp.where(k == depth_blocks - 1, r, 0)), n

    column_blocks = -(-out // columns)
    weight_bytes = packed.shape[1] * out * 4 + groups * out * (scales.dtype.itemsize + (zeros is not None))
    return pl.pallas_call(
        functools.partial(
            _body,
            cut=cut,
            bits=bits,
            block_tiles=block_tiles,
            has_zeros=zeros is not None,
            has_bias=bias_O is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(chunks, column_blocks, depth_blocks, row_blocks),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((block_rows, columns), out_block),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, out), x_MI.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tpu.CHIPS[chip].vmem_bytes * 3 // 4,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * weight.in_features * out,
            bytes_accessed=chunks * weight_bytes + x.size * 2 * column_blocks + rows * out * 2,
            transcendentals=0,
        ),
        name=f"quantized_matmul_{bits}bit_many",
    )(layer, *operands)


def _block_tiles(count: int) -> int:
    """Tiles of a block: the most that divide their number, unless they are few; then the last block is padded."""
    best = max(tiles for tiles in range(1, DEPTH_TILES + 1) if count % tiles == 0)
    return best if best >= 8 or best == count else -(-count // -(-count // 16))


def _body(layer_ref, x_ref, packed_ref, scales_ref, *refs, cut, bits, block_tiles, has_zeros, has_bias):
    del layer_ref
    refs = list(refs)
    zeros_ref = refs.pop(0) if has_zeros else None
    bias_ref = refs.pop(0) if has_bias else None
    out_ref, scale, weight, sums, *center = refs
    k, row_block = pl.program_id(2), pl.program_id(3)
    last = pl.num_programs(2) - 1
    columns = out_ref.shape[1]
    width = COLUMNS if columns % COLUMNS == 0 else LANES

    @pl.when(row_block == 0)
    def _():
        @pl.when(k == 0)
        def _():
            scale[...] = as_float(scales_ref[...])
            if has_zeros:
                center[0][...] = zeros_ref[...].astype(jnp.int32).astype(jnp.float32) - float(2 ** (bits - 1))

        zero = center[0] if has_zeros else None

        def dequantize(place, _):
            index, part = lax.div(place, jnp.int32(columns // width)), lax.rem(place, jnp.int32(columns // width))
            at = pl.ds(pl.multiple_of(part * width, width), width)
            _dequantize_tile(packed_ref, weight, scale, zero, index, k * block_tiles + index, at, cut, bits)
            return 0

        lax.fori_loop(0, block_tiles * (columns // width), dequantize, 0)

    def multiply(part, _):
        at = pl.ds(pl.multiple_of(part * width, width), width)
        product = jnp.dot(x_ref[...], weight[:, at], preferred_element_type=jnp.float32)

        @pl.when(k == 0)
        def _():
            start = jnp.broadcast_to(bias_ref[:, at], product.shape) + product if has_bias else product
            sums[row_block, :, at] = start

        @pl.when(k > 0)
        def _():
            sums[row_block, :, at] += product

        return 0

    lax.fori_loop(0, columns // width, multiply, 0)

    @pl.when(k == last)
    def _():
        out_ref[...] = sums[row_block].astype(out_ref.dtype)


def _dequantize_tile(packed_ref, weight, scale, center, index, tile, at, cut: Tiles, bits: int):
    """Writes one tile of scale · (q − zero)."""
    words_of_tile = TILE * bits // 32
    words = packed_ref[pl.ds(pl.multiple_of(index * words_of_tile, words_of_tile), words_of_tile), at]
    # Inverting the top bit of each field makes it q − 2^(bits − 1) in two's complement.
    signed = pltpu.bitcast(words ^ TOP_BITS[bits], jnp.int4 if bits == 4 else jnp.int8)
    q = signed.astype(jnp.int32).astype(jnp.float32)
    groups = [jnp.minimum(cut.group_of(tile, slot), scale.shape[0] - 1) for slot in range(cut.slots)]
    step = scale[pl.ds(groups[0], 1), at]
    zero = None if center is None else center[pl.ds(groups[0], 1), at]
    if cut.slots > 1:
        row = lax.broadcasted_iota(jnp.int32, q.shape, 0)
        first = divide(tile * TILE, cut.group_size) * cut.group_size - tile * TILE  # start of the first slot's group
        for slot in range(1, cut.slots):
            beyond = row >= first + slot * cut.group_size
            step = jnp.where(beyond, scale[pl.ds(groups[slot], 1), at], step)
            if center is not None:
                zero = jnp.where(beyond, center[pl.ds(groups[slot], 1), at], zero)
    centred = q if zero is None else q - zero
    weight[pl.ds(pl.multiple_of(index * TILE, TILE), TILE), at] = (centred * step).astype(jnp.bfloat16)

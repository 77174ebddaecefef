"""What a warpgroup of `mosaic_gpu_large` does: operands from packed words, the result's way out; what a call is."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu_call
from pallas_kernels.quantized_matmul import mosaic_gpu_fragments as fragments

X_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
STRIPS = 4  # of a warpgroup
FEATURES = STRIPS * layout.STRIP
PIECES = 2  # of a chunk, multiplied one after the other
# Registers of a consumer's thread by consumers; with the loader's they must stay below what the launch gives (65536
# over all threads, rounded down to 8 a thread), or the kernel hangs.
REGISTERS, LOADER_REGISTERS = {2: 240, 3: 160, 4: 112}, 24
MOST_ROWS = {1: 128, 2: 256, 3: 160, 4: 96}  # of x by consumers: sums fit registers; one alone waits for itself


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        warpgroups: consumers of a block, 64 columns of the matrix each.
        rows: rows of x a block, a multiple of 8 up to 256.
        splits: blocks that share the rows of the matrix.
        slots: 128-row chunks of the matrix in shared memory.
        scale_sums: scale each group's sums instead of the weights.
    """

    warpgroups: int
    rows: int
    splits: int
    slots: int
    scale_sums: bool


@dataclasses.dataclass(frozen=True)
class Problem(mosaic_gpu_call.Problem):
    """A call of this kernel."""

    tiling: Tiling

    @property
    def chunks(self) -> int:
        """Of the whole matrix."""
        return layout.chunks(self.in_features)

    @property
    def split_chunks(self) -> int:
        """Chunks of a split; the last one may have fewer."""
        return -(-self.chunks // self.tiling.splits)

    @property
    def groups(self) -> int:
        """Groups of a chunk."""
        return layout.groups_per_chunk(self.group_size)

    @property
    def block_strips(self) -> int:
        return STRIPS * self.tiling.warpgroups


def shared_bytes(problem: Problem) -> int:
    """Shared memory of a block."""
    tiling, item = problem.tiling, jnp.dtype(problem.scale_dtype).itemsize
    slot = problem.block_strips * 256 * problem.bits + tiling.rows * layout.CHUNK * 2
    columns = problem.block_strips * layout.STRIP
    slot += problem.groups * columns * item
    if not problem.symmetric:
        slot += mosaic_gpu_call.zero_rows(problem.groups, columns) * columns
    return tiling.slots * slot + 4 * 1024


def staging_fits(tiling: Tiling) -> bool:
    """Whether x's slots hold the result on its way out (`_store_whole`, `_store_sums`)."""
    row_bytes = (FEATURES + 4) * 4 if tiling.splits > 1 else (FEATURES + 8) * 2
    return tiling.warpgroups * row_bytes <= tiling.slots * layout.CHUNK * 2


def fitted(tiling: Tiling, strips: int, chunks: int, group_size: int) -> Tiling:
    """The tiling with what does not fit the matrix reduced."""
    splits = tiling.splits
    while (splits - 1) * -(-chunks // splits) >= chunks:
        splits -= 1  # no split may be empty
    return dataclasses.replace(
        tiling,
        warpgroups=max(1, min(tiling.warpgroups, strips // STRIPS)),
        splits=splits,
        scale_sums=tiling.scale_sums and group_size >= 64,  # a 64-column tile of x is the least that wgmma takes here
    )


def meet():
    """The warps of a warpgroup wait for each other. Without `commit_smem`'s fences: nothing was written."""

    @plgpu.inline_mgpu()
    def run(ctx):
        del ctx
        utils.warpgroup_barrier()

    run()


def cast(problem: Problem, refs, piece: int):
    """Operand A of a piece of a chunk, [64, 128 / pieces] in wgmma's layout: q − zero, scaled if `scales` is there."""
    names, dtype = list(refs), problem.dtype
    shape = (FEATURES, layout.CHUNK // PIECES)

    @plgpu.inline_mgpu(
        arg_types=tuple(plgpu.RefType() for _ in names),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=plgpu.Layout.WGMMA),
    )
    def run(ctx, *operands):
        del ctx
        named = dict(zip(names, operands, strict=True))
        element = ir.BF16Type.get() if dtype == "bfloat16" else ir.F16Type.get()
        pair = ir.VectorType.get((2,), element)
        registers = [utils.bitcast(word, pair) for word in cast_words(problem, named, piece)]
        kind = fragmented_array.WGMMA_LAYOUT
        shaped = np.asarray(registers, dtype=object).reshape(kind.registers_shape(shape))
        return fragmented_array.FragmentedArray(_registers=shaped, _layout=kind, _is_signed=None)

    return run(*refs.values())


def cast_words(problem: Problem, named, piece: int):
    """The registers of `cast`, each two numbers of x's type in an int32: four a 16-row step."""
    dtype, bits = problem.dtype, problem.bits
    lane, warp = fragments.lane_and_warp()
    pointer = fragments.address(
        named["packed"], fragments.multiply_add(warp, 256 * bits, arith.shli(lane, fragments.i32(4)))
    )
    parts = range(piece * bits // (2 * PIECES), (piece + 1) * bits // (2 * PIECES))
    loads = [fragments.load_shared(pointer, 512 * part, "v4.b32") for part in parts]
    flat = [word for load in loads for word in load]
    column = fragments.multiply_add(warp, layout.STRIP, arith.shrui(lane, fragments.i32(2)))
    steps, registers = layout.CHUNK // (16 * PIECES), []
    group = None
    for step in range(steps):
        words = flat[step * bits // 4 : (step + 1) * bits // 4]
        following = (piece * steps + step) * problem.groups // 8
        if following != group:
            group = following
            minus, scales = _group_factors(problem, named, column, group)
        numbers = fragments.integers(words, bits, dtype, minus, problem.symmetric)
        if scales is not None:
            numbers = [fragments.multiply(n, scales[i % 2], dtype) for i, n in enumerate(numbers)]
        registers.extend(numbers)
    return registers


def _group_factors(problem: Problem, named, column, group: int):
    """`fragments.subtrahends` of a group and its scales as 16-bit pairs (None if they are not applied to weights)."""
    zeros, scales = None, None
    stride, item = problem.block_strips * layout.STRIP, jnp.dtype(problem.scale_dtype).itemsize
    if "zeros" in named:
        place = fragments.address(named["zeros"], column)
        zeros = [fragments.load_shared(place, group * stride + high, "u8") for high in (0, 8)]
    if "scales" in named:
        place = fragments.address(named["scales"], arith.muli(column, fragments.i32(item)))
        scales = []
        for high in (0, 8):
            scale = fragments.load_shared(place, (group * stride + high) * item, "f32" if item == 4 else "u16")
            scale = fragments.widen(scale, problem.scale_dtype)
            scales.append(fragments.narrow(scale, scale, problem.dtype))
    return fragments.subtrahends(zeros, problem.bits, problem.dtype), scales


def finish(problem: Problem, sums, scratch, inputs, out_gmem, warpgroup, start, first, row):
    """Stores [64, rows] of each warpgroup, transposed through shared memory (x's slots)."""
    names = [name for name in ("bias",) if name in inputs]

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(X_TILE),
            *(plgpu.RefType() for _ in range(1 + len(names))),
            plgpu.Layout.WGMMA,
            *[plgpu.Layout.WG_SPLAT] * 4,
        )
    )
    def run(ctx, x_smem, out, *rest):
        del ctx
        bias, (sums, *scalars) = (rest[0] if names else None), rest[len(names) :]
        scalars = [scalar.registers.flatten()[0] for scalar in scalars]
        store = _store_sums if problem.tiling.splits > 1 else _store_whole
        store(problem, x_smem, out, bias, fragments.split(sums), *scalars)

    run(scratch["x_smem"], out_gmem, *(inputs[name] for name in names), sums, warpgroup, start, first, row)


def _bias(problem: Problem, bias, column):
    """float32 bias of one column, 0 past the last."""
    last = fragments.i32(problem.out_features - 1)
    return fragments.load_global(bias, arith.minui(column, last), problem.bias_dtype)


def _store_whole(problem: Problem, x_smem, out, bias, tiles, warpgroup, start, first, row):
    """One block has the whole sum: rounded to x's type, then rows of 64 columns stored 16 bytes a thread."""
    rows, stride = problem.tiling.rows, (FEATURES + 8) * 2
    lane, warp = fragments.lane_and_warp()
    thread = fragments.multiply_add(warp, 32, lane)
    base = fragments.address(x_smem, fragments.multiply_add(warpgroup, rows * stride))
    feature = fragments.multiply_add(warp, layout.STRIP, arith.shrui(lane, fragments.i32(2)))
    column = fragments.multiply_add(warpgroup, FEATURES, start)
    if bias is not None:
        added = [_bias(problem, bias, arith.addi(column, arith.addi(feature, fragments.i32(high)))) for high in (0, 8)]
        tiles = [[arith.addf(value, added[index // 2]) for index, value in enumerate(tile)] for tile in tiles]
    token = arith.shli(arith.andi(lane, fragments.i32(3)), fragments.i32(1))
    pointer = arith.addi(base, fragments.multiply_add(token, stride, arith.shli(feature, fragments.i32(1))))
    for index, tile in enumerate(tiles):
        for high in (0, 1):
            pair = fragments.narrow(tile[2 * high], tile[2 * high + 1], problem.dtype)
            place = 8 * index * stride + 16 * high
            utils.inline_ptx(
                f"{{ .reg .b16 %lo, %hi; mov.b32 {{%lo, %hi}}, $1; st.shared.b16 [$0+{place}], %lo; "
                f"st.shared.b16 [$0+{place + stride}], %hi; }}",
                pointer,
                pair,
                has_side_effects=True,
            )
    utils.warpgroup_barrier()
    piece, token = arith.andi(thread, fragments.i32(7)), arith.shrui(thread, fragments.i32(3))
    column = arith.addi(column, arith.shli(piece, fragments.i32(3)))
    source = arith.addi(base, fragments.multiply_add(token, stride, arith.shli(piece, fragments.i32(4))))
    for round_ in range(-(-rows // 16)):
        target = arith.addi(row, arith.addi(token, fragments.i32(16 * round_)))
        inside = arith.addi(token, fragments.i32(16 * round_))
        present = _present(problem, target, column, first)
        present = arith.andi(present, arith.cmpi(arith.CmpIPredicate.ult, inside, fragments.i32(rows)))
        with utils.when(present):
            words = fragments.load_shared(source, 16 * round_ * stride, "v4.b32")
            fragments.store_row(out, target, column, words, problem.out_features)


def _present(problem: Problem, row, column, first):
    """Whether this thread's place belongs to the block and the result."""
    present = arith.cmpi(arith.CmpIPredicate.ult, row, fragments.i32(problem.rows))
    present = arith.andi(present, arith.cmpi(arith.CmpIPredicate.uge, column, first))
    return arith.andi(present, arith.cmpi(arith.CmpIPredicate.ult, column, fragments.i32(problem.out_features)))


def _store_sums(problem: Problem, x_smem, out, bias, tiles, warpgroup, start, first, row):
    """Blocks of a cluster hold parts of the sum: put into shared memory as float32, each adds and stores some rows."""
    rows, stride = problem.tiling.rows, (FEATURES + 4) * 4
    lane, warp = fragments.lane_and_warp()
    thread = fragments.multiply_add(warp, 32, lane)
    base = fragments.address(x_smem, fragments.multiply_add(warpgroup, rows * stride))
    feature = fragments.multiply_add(warp, layout.STRIP, arith.shrui(lane, fragments.i32(2)))
    token = arith.shli(arith.andi(lane, fragments.i32(3)), fragments.i32(1))
    pointer = arith.addi(base, fragments.multiply_add(token, stride, arith.shli(feature, fragments.i32(2))))
    for index, tile in enumerate(tiles):
        for part, value in enumerate(tile):
            place = (8 * index + part % 2) * stride + 32 * (part // 2)
            utils.inline_ptx(f"st.shared.f32 [$0+{place}], $1;", pointer, value, has_side_effects=True)
    piece, token = arith.andi(thread, fragments.i32(15)), arith.shrui(thread, fragments.i32(4))
    column = fragments.multiply_add(warpgroup, FEATURES, start, arith.shli(piece, fragments.i32(2)))
    kind = ir.IntegerType.get_signless(32)
    share = -(-rows // problem.tiling.splits)
    fragments.cluster_barrier()
    rank = utils.inline_ptx("mov.u32 $0, %cluster_ctarank;", result_types=kind, has_side_effects=True)
    begin = arith.muli(rank, fragments.i32(share))
    place = arith.addi(
        base, fragments.multiply_add(arith.addi(begin, token), stride, arith.shli(piece, fragments.i32(4)))
    )
    ptx = "mapa.shared::cluster.u32 $0, $1, {};"
    places = [
        utils.inline_ptx(ptx.format(block), place, result_types=kind, has_side_effects=True)
        for block in range(problem.tiling.splits)
    ]
    for round_ in range(-(-share // 8)):
        local = arith.addi(token, fragments.i32(8 * round_))
        inside = arith.addi(begin, local)
        target = arith.addi(row, inside)
        present = _present(problem, target, column, first)
        present = arith.andi(present, arith.cmpi(arith.CmpIPredicate.ult, local, fragments.i32(share)))
        present = arith.andi(present, arith.cmpi(arith.CmpIPredicate.ult, inside, fragments.i32(rows)))
        with utils.when(present):
            parts = [
                utils.inline_ptx(
                    f"ld.shared::cluster.v4.f32 {{$0, $1, $2, $3}}, [$4+{8 * round_ * stride}];",
                    place,
                    result_types=[fragments.f32_type()] * 4,
                    has_side_effects=True,
                )
                for place in places
            ]
            values = [functools.reduce(arith.addf, column_parts) for column_parts in zip(*parts, strict=True)]
            if bias is not None:
                values = [
                    arith.addf(value, _bias(problem, bias, arith.addi(column, fragments.i32(i))))
                    for i, value in enumerate(values)
                ]
            words = [
                fragments.narrow(values[0], values[1], problem.dtype),
                fragments.narrow(values[2], values[3], problem.dtype),
            ]
            fragments.store_row(out, target, column, words, problem.out_features)
    fragments.cluster_barrier()  # the other blocks may still read

"""What the warps of `mosaic_gpu_small` do: a stage's products, and the sums of all warps; and what describes a call."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu_call
from pallas_kernels.quantized_matmul import mosaic_gpu_fragments as fragments

WARPS = 4
STAGE = WARPS * layout.CHUNK
X_PADDING = 8  # elements after each row of x in shared memory: the rows of an 8 × 8 matrix fall on different banks
X_ROW_COPIES = 4  # up to so many rows of x are copied one by one, without a tensor map
X_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        strips: 16-column strips a block.
        warpgroups: of a block.
        slots: of each warpgroup's ring.
    """

    strips: int
    warpgroups: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Problem(mosaic_gpu_call.Problem):
    """A call of this kernel."""

    tiling: Tiling

    @property
    def chunks(self) -> int:
        return layout.chunks(self.in_features)

    @property
    def stages(self) -> int:
        return -(-self.chunks // WARPS)

    @property
    def groups(self) -> int:
        """Groups of a chunk."""
        return layout.groups_per_chunk(self.group_size)

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // 8)

    @property
    def x_tiled(self) -> bool:
        """Whether x comes in swizzled 8 × 64 tiles by a tensor map instead of padded rows."""
        return self.rows > X_ROW_COPIES

    @property
    def group_rows(self) -> int:
        """Rows of scales copied for a stage."""
        return WARPS * self.groups

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.tiling.strips * layout.STRIP

    @property
    def partial_stride(self) -> int:
        """Row stride of the partial sums: 4 more than a multiple of 16, for fewer bank conflicts."""
        return self.columns + 4


def shared_bytes(problem: Problem) -> int:
    """Shared memory of a block."""
    tiling, item = problem.tiling, jnp.dtype(problem.scale_dtype).itemsize
    slot = WARPS * tiling.strips * 256 * problem.bits
    slot += 8 * problem.row_tiles * STAGE * 2 if problem.x_tiled else problem.rows * (STAGE + X_PADDING) * 2
    slot += problem.group_rows * problem.columns * item
    if not problem.symmetric:
        slot += mosaic_gpu_call.zero_rows(problem.group_rows, problem.columns) * problem.columns
    partial = tiling.warpgroups * WARPS * problem.rows * problem.partial_stride * 4
    return tiling.warpgroups * tiling.slots * (slot + 8) + partial + 6 * 1024


def multiply(problem: Problem, refs, stage, sums):
    """sums [64, (strip, row of x)] plus this stage's products; row 16w + c: warp w's share of column c of a strip."""
    order = [name for name in ("packed_smem", "x_smem", "scales_smem", "zeros_smem") if name in refs]
    kinds = [plgpu.RefType(X_TILE) if name == "x_smem" and problem.x_tiled else plgpu.RefType() for name in order]

    @plgpu.inline_mgpu(
        arg_types=(*kinds, plgpu.Layout.WG_SPLAT, plgpu.Layout.WGMMA),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def run(ctx, *operands):
        del ctx
        named, (stage, sums) = dict(zip(order, operands, strict=False)), operands[len(order) :]
        stage = stage.registers.flatten()[0]
        lane, warp = fragments.lane_and_warp()

        def products():
            return fragments.join(sums, _warp_products(problem, named, stage, lane, warp, fragments.split(sums)))

        if problem.chunks % WARPS == 0:
            return products()
        chunk = fragments.multiply_add(stage, WARPS, warp)
        present = arith.cmpi(arith.CmpIPredicate.slt, chunk, fragments.i32(problem.chunks))
        branch = scf.IfOp(present, [register.type for register in sums.registers.flatten()], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(list(products().registers.flatten()))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(sums.registers.flatten()))
        registers = np.asarray(list(branch.results), dtype=object).reshape(sums.registers.shape)
        return type(sums)(_registers=registers, _layout=sums.layout, _is_signed=None)

    return run(*(refs[name] for name in order), stage, sums)


def _load_x(problem: Problem, x_smem, lane, warp):
    """Operand B of a warp's chunk: [row tile][step] two registers."""
    row, matrix = arith.andi(lane, fragments.i32(7)), arith.shrui(lane, fragments.i32(3))
    tiles = []
    for tile in range(problem.row_tiles):
        if problem.x_tiled:  # 8 × 64 tiles of 1 KB, 16-byte pieces of row r at place (piece ^ r)
            piece = arith.shli(arith.xori(row, matrix), fragments.i32(4))
            offset = fragments.multiply_add(warp, 2048, fragments.multiply_add(row, 128, piece))
            low = fragments.address(x_smem, offset)
            high = arith.xori(low, fragments.i32(64))
            places = [(low, 0), (high, 0), (low, 1024), (high, 1024)]
            places = [(pointer, part + tile * 8 * STAGE * 2) for pointer, part in places]
        else:
            clamped = arith.minui(row, fragments.i32(problem.rows - 1))
            column = fragments.multiply_add(warp, 2 * layout.CHUNK, arith.shli(matrix, fragments.i32(4)))
            pointer = fragments.address(x_smem, fragments.multiply_add(clamped, (STAGE + X_PADDING) * 2, column))
            places = [(pointer, 64 * quarter) for quarter in range(4)]
        loads = [fragments.load_matrices(*place) for place in places]
        tiles.append([pair for load in loads for pair in (load[:2], load[2:])])
    return tiles


def _warp_products(problem: Problem, refs, stage, lane, warp, sums):
    """One warp's chunk times x, all strips; sums as (strip, row tile) lists of four scalars.

    Σ (q − zero) · x = Σ encoded · x − (offset + zero) · Σ x: the second term is where each group's sum starts from.
    """
    strips, tiles, bits, dtype = problem.tiling.strips, problem.row_tiles, problem.bits, problem.dtype
    unit_bytes, (unit, offset) = 256 * bits, fragments.encoding(bits, dtype)
    packed = fragments.address(
        refs["packed_smem"], fragments.multiply_add(warp, strips * unit_bytes, arith.shli(lane, fragments.i32(4)))
    )
    x = _load_x(problem, refs["x_smem"], lane, warp)
    item = jnp.dtype(problem.scale_dtype).itemsize
    if problem.group_size <= layout.CHUNK:
        group_row = arith.muli(warp, fragments.i32(problem.groups))
    else:
        size, start = fragments.i32(problem.group_size), fragments.multiply_add(stage, STAGE)
        chunk = fragments.multiply_add(warp, layout.CHUNK, start)
        group_row = arith.subi(arith.divui(chunk, size), arith.divui(start, size))
    place = fragments.multiply_add(group_row, problem.columns, arith.shrui(lane, fragments.i32(2)))
    scales = fragments.address(refs["scales_smem"], arith.muli(place, fragments.i32(item)))
    zeros = None if problem.symmetric else fragments.address(refs["zeros_smem"], place)
    steps = 8 // problem.groups
    x_sums = []  # [group][row tile]: Σ x of this thread's two rows, as fragments.product lays them out
    for group in range(problem.groups):
        x_sums.append([None] * tiles)
        for step in range(group * steps, (group + 1) * steps):
            for tile in range(tiles):
                x_sums[group][tile] = fragments.product(
                    fragments.ones(dtype), x[tile][step], x_sums[group][tile], dtype
                )

    def scaled(values, factors):
        return [arith.mulf(value, factors[index // 2]) for index, value in enumerate(values)]

    middle = fragments.f32(-(offset + unit * 2 ** (bits - 1)))
    if problem.symmetric:
        starts = [[scaled(tile, [middle] * 2) for tile in group] for group in x_sums]
    results = []
    for strip in range(strips):
        loads = [fragments.load_shared(packed, strip * unit_bytes + 512 * part, "v4.b32") for part in range(bits // 2)]
        flat = [word for load in loads for word in load]
        words = [flat[step * bits // 4 : (step + 1) * bits // 4] for step in range(8)]
        totals = [sums[strip * tiles + tile] for tile in range(tiles)]
        for group in range(problem.groups):
            position = group * problem.columns + strip * layout.STRIP
            if problem.symmetric:
                accumulated = list(starts[group])
            else:
                factors = []
                for high in (0, 8):
                    zero = arith.uitofp(fragments.f32_type(), fragments.load_shared(zeros, position + high, "u8"))
                    factors.append(fragments.fma(zero, fragments.f32(-unit), fragments.f32(-offset)))
                accumulated = [scaled(x_sums[group][tile], factors) for tile in range(tiles)]
            for step in range(group * steps, (group + 1) * steps):
                a = fragments.encoded(words[step], bits, dtype)
                for tile in range(tiles):
                    accumulated[tile] = fragments.product(a, x[tile][step], accumulated[tile], dtype)
            scale = [_load_scale(problem, scales, (position + high) * item, unit) for high in (0, 8)]
            totals = [
                [fragments.fma(accumulated[tile][i], scale[i // 2], totals[tile][i]) for i in range(4)]
                for tile in range(tiles)
            ]
        results.extend(totals)
    return results


def _load_scale(problem: Problem, scales, offset: int, unit: float):
    """A scale over the unit of `fragments.encoding`, float32."""
    kind = "f32" if problem.scale_dtype == "float32" else "u16"
    scale = fragments.widen(fragments.load_shared(scales, offset, kind), problem.scale_dtype)
    return scale if unit == 1.0 else arith.mulf(scale, fragments.f32(1 / unit))


def finish(problem: Problem, sums, scratch, inputs, out_gmem, warpgroup, start, first):
    """Adds all warps' sums and stores columns `first` … of the block whose columns begin at `start`."""
    tiling, tiles, stride = problem.tiling, problem.row_tiles, problem.partial_stride

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store_partial(ctx, partial, sums):
        del ctx
        lane, warp = fragments.lane_and_warp()
        row = arith.shli(arith.andi(lane, fragments.i32(3)), fragments.i32(1))
        column = arith.shrui(lane, fragments.i32(2))
        offset = fragments.multiply_add(row, stride, column, fragments.multiply_add(warp, problem.rows * stride))
        pointer = fragments.address(partial, fragments.multiply_add(offset, 4))
        split = fragments.split(sums)
        for strip in range(tiling.strips):
            for tile in range(tiles):
                for index, value in enumerate(split[strip * tiles + tile]):
                    high, odd = divmod(index, 2)
                    place = (8 * tile + odd) * stride + strip * layout.STRIP + 8 * high
                    limit = problem.rows - 8 * tile - odd
                    predicate = arith.cmpi(arith.CmpIPredicate.slt, row, fragments.i32(limit)) if limit < 8 else None
                    utils.inline_ptx(
                        f"st.shared.f32 [$0+{4 * place}], $1;", pointer, value, predicate=predicate,
                        has_side_effects=True,
                    )  # fmt: skip
        utils.warpgroup_barrier()

    store_partial(scratch["partial_smem"].at[pl.ds(warpgroup * WARPS, WARPS)], sums)
    plgpu.barrier_arrive(scratch["done"])
    plgpu.barrier_wait(scratch["done"])
    names = ["bias"] if "bias" in inputs else []

    @plgpu.inline_mgpu(
        arg_types=(*(plgpu.RefType() for _ in range(2 + len(names))), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
    )
    def store(ctx, partial, out, *rest):
        del ctx
        added = dict(zip(names, rest, strict=False))
        start, first = (value.registers.flatten()[0] for value in rest[len(names) :])
        _store_block(problem, partial, out, added, start, first)

    store(scratch["partial_smem"], out_gmem, *(inputs[name] for name in names), start, first)


def _store_block(problem: Problem, partial, out, added, start, first):
    """Every thread: out elements tid, tid + threads, … of the block, each the sum of all warps' parts."""
    warps = problem.tiling.warpgroups * WARPS
    threads, columns, stride = warps * 32, problem.columns, problem.partial_stride
    element = ir.BF16Type.get() if problem.dtype == "bfloat16" else ir.F16Type.get()
    base = fragments.address(partial)
    thread, total = utils.thread_idx(), problem.rows * columns

    for round_ in range(-(-total // threads)):
        index = arith.addi(thread, fragments.i32(round_ * threads))
        row = arith.divui(index, fragments.i32(columns))
        column = arith.remui(index, fragments.i32(columns))
        where = arith.addi(start, column)
        present = arith.cmpi(arith.CmpIPredicate.ult, where, fragments.i32(problem.out_features))
        present = arith.andi(present, arith.cmpi(arith.CmpIPredicate.uge, where, first))
        present = arith.andi(present, arith.cmpi(arith.CmpIPredicate.ult, index, fragments.i32(total)))
        with utils.when(present):
            source = arith.addi(base, fragments.multiply_add(fragments.multiply_add(row, stride, column), 4))
            parts = [fragments.load_shared(source, 4 * warp * problem.rows * stride, "f32") for warp in range(warps)]
            value = functools.reduce(arith.addf, parts)
            place = fragments.multiply_add(row, problem.out_features, where)
            if "bias" in added:
                value = arith.addf(value, fragments.load_global(added["bias"], where, problem.bias_dtype))
            wide = arith.extui(ir.IntegerType.get_signless(64), place)
            llvm.store(arith.truncf(element, value), fragments.global_pointer(out, wide, element))

"""Many rows of x on Hopper: weights dequantized into wgmma's register operand, x from shared memory.

A block owns 64 columns of the matrix for each of its consumer warpgroups and a tile of x's rows; the product is computed
transposed, [columns, rows of x], so that few rows cost little. One more warpgroup loads.

- Loads: the last warpgroup, one stage of `chunks` · 128 matrix rows after another into a ring of slots.
- Computes: a consumer turns packed words into operand A in registers and multiplies by x's tile (operand B).
- Scales: `scale_sums` multiplies each group's sums in float32 (exact, for few rows of x); otherwise weights are scaled
  in x's type before the product.
- Barriers: `full` (copies landed), `empty` (all consumers have read a slot), `done` (before shared memory is reused).
- Splits: with `splits` > 1 a cluster of blocks shares the rows of the matrix; each adds a part of the result from all
  blocks' shared memory, in one fixed order.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu_fragments as fragments
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

X_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
STRIPS = 4  # of a warpgroup
FEATURES = STRIPS * layout.STRIP
# Registers of a consumer's thread by consumers; with the loader's they must stay below what the launch gives (65536
# over all threads, rounded down to 8 a thread), or the kernel hangs.
REGISTERS, LOADER_REGISTERS = {2: 232, 3: 152, 4: 104}, 40


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        warpgroups: consumers of a block, 64 columns of the matrix each.
        rows: rows of x a block, a multiple of 8 up to 256.
        splits: blocks that share the rows of the matrix.
        chunks: 128-row chunks of the matrix a stage.
        slots: stages in shared memory.
        scale_sums: scale each group's sums instead of the weights.
    """

    warpgroups: int
    rows: int
    splits: int
    chunks: int
    slots: int
    scale_sums: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """All static properties of one call."""

    rows: int
    in_features: int
    out_features: int
    bits: int
    group_size: int
    stacked: bool
    static_layer: int | None
    dtype: str
    scale_dtype: str
    symmetric: bool
    bias_dtype: str | None
    strips: int
    tiling: Tiling

    @property
    def stages(self) -> int:
        """Stages of the whole matrix."""
        return layout.chunks(self.in_features) // self.tiling.chunks

    @property
    def split_stages(self) -> int:
        """Stages of a split; the last one may have fewer."""
        return -(-self.stages // self.tiling.splits)

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
    slot += problem.groups * problem.block_strips * layout.STRIP * (item + (not problem.symmetric))
    return tiling.slots * tiling.chunks * slot + 4 * 1024


def call(
    x_MI: jax.Array,
    weight: QuantizedTensor,
    layer=None,
    bias_O=None,
    *,
    tiling: Tiling,
    portable: bool = False,
    after=None,
) -> jax.Array:
    """[M, O] = x · weight + bias in x's dtype; weight in layout "mosaic_gpu", x in its stored row order.

    `portable` and `after`: as in `mosaic_gpu_small.call`.
    """
    rows, in_features = x_MI.shape
    x_MI = fragments.padded(x_MI, layout.CHUNK)
    static_layer = layer if isinstance(layer, int) else None
    strips = weight.packed.shape[-2]
    problem = Problem(
        rows=rows,
        in_features=in_features,
        out_features=weight.out_features,
        bits=weight.bits,
        group_size=weight.group_size,
        stacked=bool(weight.stack),
        static_layer=static_layer,
        dtype=fragments.name(x_MI.dtype),
        scale_dtype=fragments.name(weight.scales.dtype),
        symmetric=weight.zeros is None,
        bias_dtype=None if bias_O is None else fragments.name(bias_O.dtype),
        strips=strips,
        tiling=fitted(tiling, strips, layout.chunks(in_features), weight.group_size),
    )
    inputs = {"x": x_MI, "packed": weight.packed, "scales": weight.scales}
    if weight.zeros is not None:
        inputs["zeros"] = weight.zeros
    if weight.stack and static_layer is None:
        inputs["layer"] = jnp.asarray(layer, jnp.int32).reshape(1)
    if bias_O is not None:
        inputs["bias"] = bias_O
    if after is not None:
        inputs["after"] = after
    if portable and bias_O is not None:
        inputs["bias"] = jnp.pad(bias_O, (0, strips * layout.STRIP - bias_O.shape[0]))
    return _compiled(problem, tuple(inputs), portable)(*inputs.values())[:rows, : weight.out_features]


def fitted(tiling: Tiling, strips: int, chunks: int, group_size: int) -> Tiling:
    """The tiling with what does not fit the matrix reduced."""
    stage = math.gcd(tiling.chunks, chunks)
    splits = tiling.splits
    while (splits - 1) * -(-(chunks // stage) // splits) >= chunks // stage:
        splits -= 1  # no split may be empty
    return dataclasses.replace(
        tiling,
        warpgroups=max(1, min(tiling.warpgroups, strips // STRIPS)),
        chunks=stage,
        splits=splits,
        scale_sums=tiling.scale_sums and group_size >= 64,  # a 64-column tile of x is the least that wgmma takes here
    )


@functools.lru_cache(maxsize=256)
def _compiled(problem: Problem, names: tuple[str, ...], portable: bool):
    tiling = problem.tiling
    ring = (tiling.slots, tiling.chunks)
    columns = problem.block_strips * layout.STRIP
    dtype = jnp.dtype(problem.dtype)
    scratch = {
        "x_smem": plgpu.SMEM((tiling.slots, tiling.rows, tiling.chunks * layout.CHUNK), dtype, transforms=X_TILE),
        "packed_smem": plgpu.SMEM((*ring, problem.block_strips, 64 * problem.bits), jnp.int32),
        "scales_smem": plgpu.SMEM((*ring, problem.groups, columns), jnp.dtype(problem.scale_dtype)),
        "full": plgpu.Barrier(
            num_arrivals=1 + tiling.chunks * (2 if problem.symmetric else 3), num_barriers=tiling.slots
        ),
        "empty": plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.slots),
        "done": plgpu.Barrier(num_arrivals=tiling.warpgroups),
    }
    if not problem.symmetric:
        scratch["zeros_smem"] = plgpu.SMEM((*ring, problem.groups, columns), jnp.uint8)

    def kernel(*refs, **scratch):
        inputs = dict(zip(names, refs[:-1], strict=True))
        _body(problem, inputs, refs[-1], scratch, portable)

    shape = (problem.rows, problem.out_features)
    if portable:
        shape = (-(-problem.rows // tiling.rows) * tiling.rows, problem.strips * layout.STRIP)
    cluster = {"cluster": (tiling.splits,), "cluster_names": ("split",)} if tiling.splits > 1 else {}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(-(-problem.strips // problem.block_strips), -(-problem.rows // tiling.rows)),
        grid_names=("block", "rows"),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=f"quantized_matmul_w{problem.bits}_m{problem.rows}",
        **cluster,
    )


def _body(problem: Problem, inputs, out_gmem, scratch, portable: bool):
    tiling = problem.tiling
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    row = lax.axis_index("rows") * tiling.rows
    # As in mosaic_gpu_small: the last block may start earlier, columns it shares are stored by their owner alone.
    strip = jnp.minimum(block * problem.block_strips, max(0, problem.strips - problem.block_strips))
    first_stage, count = jnp.int32(0), jnp.int32(problem.stages)
    if tiling.splits > 1:
        first_stage = lax.axis_index("split") * problem.split_stages
        count = jnp.minimum(problem.split_stages, problem.stages - first_stage)
    layer = problem.static_layer
    if problem.stacked and layer is None:
        layer = inputs["layer"][0]

    def weight(name):
        return inputs[name] if layer is None else inputs[name].at[layer]

    def fetch(index, slot):
        barrier, stage = scratch["full"].at[slot], first_stage + index
        for part in range(tiling.chunks):
            chunk = stage * tiling.chunks + part
            plgpu.copy_gmem_to_smem(
                weight("packed").at[chunk, pl.ds(strip, problem.block_strips)],
                scratch["packed_smem"].at[slot, part],
                barrier,
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )
        columns = pl.ds(stage * tiling.chunks * layout.CHUNK, tiling.chunks * layout.CHUNK)
        plgpu.copy_gmem_to_smem(
            inputs["x"].at[pl.ds(row, tiling.rows), columns], scratch["x_smem"].at[slot], barrier
        )
        for part in range(tiling.chunks):
            group = lax.div((stage * tiling.chunks + part) * layout.CHUNK, problem.group_size)
            for name in ("scales", "zeros"):
                if name in inputs:
                    source = weight(name).at[
                        pl.ds(group, problem.groups),
                        pl.ds(strip * layout.STRIP, problem.block_strips * layout.STRIP),
                    ]
                    plgpu.copy_gmem_to_smem(source, scratch[f"{name}_smem"].at[slot, part], barrier)

    @pl.when(warpgroup == tiling.warpgroups)
    def load():
        if not portable and tiling.warpgroups in REGISTERS:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

        @pl.loop(0, count)
        def _(index):
            slot = lax.rem(index, tiling.slots)

            @pl.when(index >= tiling.slots)
            def _():
                plgpu.barrier_wait(scratch["empty"].at[slot])

            fetch(index, slot)

        if portable:  # the interpreter wants every phase of a barrier seen
            for slot in range(tiling.slots):

                @pl.when(slot < count)
                def _(slot=slot):
                    plgpu.barrier_wait(scratch["empty"].at[slot])

    @pl.when(warpgroup < tiling.warpgroups)
    def compute():
        if not portable and tiling.warpgroups in REGISTERS:
            plgpu.set_max_registers(REGISTERS[tiling.warpgroups], action="increase")

        def wait(index):
            slot = lax.rem(index, tiling.slots)
            plgpu.barrier_wait(scratch["full"].at[slot])
            return slot

        def release(slot):
            plgpu.commit_smem()  # every warp has read the slot
            plgpu.barrier_arrive(scratch["empty"].at[slot])

        consume, finish = (_portable_consume, _portable_finish) if portable else (_consume, _finish)
        sums = consume(problem, scratch, warpgroup, count, wait, release)
        first = block * problem.block_strips * layout.STRIP
        plgpu.barrier_arrive(scratch["done"])
        plgpu.barrier_wait(scratch["done"])
        finish(problem, sums, scratch, inputs, out_gmem, warpgroup, strip * layout.STRIP, first, row)


def _consume(problem: Problem, scratch, warpgroup, count, wait, release):
    """[64, rows] float32: this warpgroup's columns of the block's stages."""
    tiling = problem.tiling
    pieces = problem.groups if tiling.scale_sums else 1
    shape, depth = (FEATURES, tiling.rows), layout.CHUNK // pieces

    def operands(slot, part):
        strips = pl.ds(warpgroup * STRIPS, STRIPS)
        refs = {"packed": scratch["packed_smem"].at[slot, part, strips]}
        columns = pl.ds(warpgroup * FEATURES, FEATURES)
        if not tiling.scale_sums:
            refs["scales"] = scratch["scales_smem"].at[slot, part, :, columns]
        if not problem.symmetric:
            refs["zeros"] = scratch["zeros_smem"].at[slot, part, :, columns]
        return _cast(problem, refs, pieces)

    def x_part(slot, part, piece):
        return scratch["x_smem"].at[slot, :, pl.ds(part * layout.CHUNK + piece * depth, depth)].T

    if tiling.scale_sums:

        def step(index, total):
            slot = wait(index)

            def products(*accumulators):
                for part in range(tiling.chunks):
                    for group, a in enumerate(operands(slot, part)):
                        plgpu.wgmma(accumulators[part * problem.groups + group], a, x_part(slot, part, group))
                plgpu.wgmma_wait(0)
                return tuple(accumulator[...] for accumulator in accumulators)

            accumulators = [plgpu.ACC(shape)] * (tiling.chunks * problem.groups)
            for index_, sums in enumerate(pl.run_scoped(products, *accumulators)):
                part, group = divmod(index_, problem.groups)
                scales = plgpu.load(
                    scratch["scales_smem"].at[slot, part, group, pl.ds(warpgroup * FEATURES, FEATURES)],
                    layout=plgpu.Layout.WGMMA.reduce(1),
                )
                total = total + sums * lax.broadcast_in_dim(scales.astype(jnp.float32), shape, [0])
            release(slot)
            return total

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, count, step, zeros)

    def scope(accumulator):
        @pl.loop(0, count)
        def _(index):
            slot = wait(index)
            for part in range(tiling.chunks):
                (a,) = operands(slot, part)
                plgpu.wgmma(accumulator, a, x_part(slot, part, 0))
                plgpu.wgmma_wait(0)
            release(slot)

        return accumulator[...]

    return pl.run_scoped(scope, plgpu.ACC(shape))


def _cast(problem: Problem, refs, pieces: int):
    """Operand A of a chunk in wgmma's layout, in `pieces` of [64, 128 / pieces]: q − zero, scaled if `scales` is there."""
    names, dtype, bits = list(refs), problem.dtype, problem.bits
    shape = (FEATURES, layout.CHUNK // pieces)
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(
        arg_types=tuple(plgpu.RefType() for _ in names), return_type=tuple([result] * pieces)
    )
    def run(ctx, *operands):
        del ctx
        named = dict(zip(names, operands, strict=True))
        lane, warp = fragments.lane_and_warp()
        pointer = fragments.address(
            named["packed"], fragments.multiply_add(warp, 256 * bits, arith.shli(lane, fragments.i32(4)))
        )
        loads = [fragments.load_shared(pointer, 512 * part, "v4.b32") for part in range(bits // 2)]
        flat = [word for load in loads for word in load]
        words = [flat[step * bits // 4 : (step + 1) * bits // 4] for step in range(8)]
        column = fragments.multiply_add(warp, layout.STRIP, arith.shrui(lane, fragments.i32(2)))
        stride = problem.block_strips * layout.STRIP
        minus, registers = fragments.subtrahends(None, bits, dtype), []
        element = ir.BF16Type.get() if dtype == "bfloat16" else ir.F16Type.get()
        for group in range(problem.groups):
            if "zeros" in named:
                zeros = fragments.address(named["zeros"], column)
                pair = [fragments.load_shared(zeros, group * stride + high, "u8") for high in (0, 8)]
                minus = fragments.subtrahends(pair, bits, dtype)
            if "scales" in named:
                item = jnp.dtype(problem.scale_dtype).itemsize
                place = fragments.address(named["scales"], arith.muli(column, fragments.i32(item)))
                kind = "f32" if item == 4 else "u16"
                scales = []
                for high in (0, 8):
                    scale = fragments.load_shared(place, (group * stride + high) * item, kind)
                    scale = fragments.widen(scale, problem.scale_dtype)
                    scales.append(fragments.narrow(scale, scale, dtype))
            for step in range(group * 8 // problem.groups, (group + 1) * 8 // problem.groups):
                numbers = fragments.integers(words[step], bits, dtype, minus, problem.symmetric)
                if "scales" in named:
                    numbers = [fragments.multiply(n, scales[i % 2], dtype) for i, n in enumerate(numbers)]
                registers.extend(utils.bitcast(n, ir.VectorType.get((2,), element)) for n in numbers)
        kind, count = fragmented_array.WGMMA_LAYOUT, len(registers) // pieces
        results = []
        for piece in range(pieces):
            shaped = np.asarray(registers[piece * count : (piece + 1) * count], dtype=object)
            shaped = shaped.reshape(kind.registers_shape(shape))
            results.append(fragmented_array.FragmentedArray(_registers=shaped, _layout=kind, _is_signed=None))
        return tuple(results)

    return run(*refs.values())


def _finish(problem: Problem, sums, scratch, inputs, out_gmem, warpgroup, start, first, row):
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
        store = _store_split if problem.tiling.splits > 1 else _store_whole
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
        added = [
            _bias(problem, bias, arith.addi(column, arith.addi(feature, fragments.i32(high)))) for high in (0, 8)
        ]
        tiles = [[arith.addf(value, added[index // 2]) for index, value in enumerate(tile)] for tile in tiles]
    token = arith.shli(arith.andi(lane, fragments.i32(3)), fragments.i32(1))
    pointer = arith.addi(
        base, fragments.multiply_add(token, stride, arith.shli(feature, fragments.i32(1)))
    )
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


def _store_split(problem: Problem, x_smem, out, bias, tiles, warpgroup, start, first, row):
    """The cluster's blocks hold parts of the sum: float32 into shared memory, each block adds a share of the rows."""
    rows, splits, stride = problem.tiling.rows, problem.tiling.splits, (FEATURES + 4) * 4
    lane, warp = fragments.lane_and_warp()
    thread = fragments.multiply_add(warp, 32, lane)
    base = fragments.address(x_smem, fragments.multiply_add(warpgroup, rows * stride))
    feature = fragments.multiply_add(warp, layout.STRIP, arith.shrui(lane, fragments.i32(2)))
    token = arith.shli(arith.andi(lane, fragments.i32(3)), fragments.i32(1))
    pointer = arith.addi(
        base, fragments.multiply_add(token, stride, arith.shli(feature, fragments.i32(2)))
    )
    for index, tile in enumerate(tiles):
        for part, value in enumerate(tile):
            place = (8 * index + part % 2) * stride + 32 * (part // 2)
            utils.inline_ptx(f"st.shared.f32 [$0+{place}], $1;", pointer, value, has_side_effects=True)
    barrier = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    utils.inline_ptx(barrier, has_side_effects=True, convergent=True)
    rank = utils.inline_ptx(
        "mov.u32 $0, %cluster_ctarank;", result_types=ir.IntegerType.get_signless(32), has_side_effects=True
    )
    share = -(-rows // splits)
    piece, token = arith.andi(thread, fragments.i32(15)), arith.shrui(thread, fragments.i32(4))
    begin = arith.muli(rank, fragments.i32(share))
    column = fragments.multiply_add(warpgroup, FEATURES, start, arith.shli(piece, fragments.i32(2)))
    remote = []
    for other in range(splits):
        place = arith.addi(
            base,
            fragments.multiply_add(arith.addi(begin, token), stride, arith.shli(piece, fragments.i32(4))),
        )
        remote.append(
            utils.inline_ptx(
                f"mapa.shared::cluster.u32 $0, $1, {other};",
                place,
                result_types=ir.IntegerType.get_signless(32),
                has_side_effects=True,
            )
        )
    f32 = fragments.f32_type()
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
                    result_types=[f32] * 4,
                    has_side_effects=True,
                )
                for place in remote
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
    utils.inline_ptx(barrier, has_side_effects=True, convergent=True)


def _portable_consume(problem: Problem, scratch, warpgroup, count, wait, release):
    """`_consume` in plain operations."""
    tiling, depth = problem.tiling, layout.CHUNK // problem.groups

    def step(index, total):
        slot = wait(index)
        for part in range(tiling.chunks):
            packed = scratch["packed_smem"][slot, part, pl.ds(warpgroup * STRIPS, STRIPS)]
            q = layout.integers(packed[None], problem.bits).astype(jnp.float32)
            for group in range(problem.groups):
                columns = pl.ds(warpgroup * FEATURES, FEATURES)
                minus = float(2 ** (problem.bits - 1))
                if not problem.symmetric:
                    minus = scratch["zeros_smem"][slot, part, group, columns].astype(jnp.float32)
                values = q[group * depth : (group + 1) * depth] - minus
                x = scratch["x_smem"][slot, :, pl.ds(part * layout.CHUNK + group * depth, depth)]
                product = jnp.dot(values.T, x.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
                scales = scratch["scales_smem"][slot, part, group, columns].astype(jnp.float32)
                total = total + product * scales[:, None]
        release(slot)
        return total

    return lax.fori_loop(0, count, step, jnp.zeros((FEATURES, tiling.rows), jnp.float32))


def _portable_finish(problem: Problem, sums, scratch, inputs, out_gmem, warpgroup, start, first, row):
    """`_finish` in plain operations, one split; the result has room for whole tiles."""
    del scratch
    for strip in range(STRIPS):
        column = start + warpgroup * FEATURES + strip * layout.STRIP

        @pl.when(column >= first)
        def _(strip=strip, column=column):
            value = sums[strip * layout.STRIP : (strip + 1) * layout.STRIP].T
            if "bias" in inputs:
                value = value + inputs["bias"][pl.ds(column, layout.STRIP)].astype(jnp.float32)
            out_gmem[pl.ds(row, problem.tiling.rows), pl.ds(column, layout.STRIP)] = value.astype(out_gmem.dtype)

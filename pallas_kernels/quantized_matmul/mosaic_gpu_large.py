"""Many rows of x on Hopper: weights dequantized into wgmma's register operand, x from shared memory.

A block owns 64 columns of the matrix for each of its consumer warpgroups and a tile of x's rows; the product is
computed transposed, [columns, rows of x], so that few rows cost little. One more warpgroup loads.

- Loads: the last warpgroup, one stage of `chunks` · 128 matrix rows after another into a ring of slots.
- Computes: a consumer turns packed words into operand A in registers and multiplies by x's tile (operand B).
- Scales: `scale_sums` multiplies each group's sums in float32 (exact, for few rows of x); otherwise weights are scaled
  in x's type before the product.
- Barriers: `full` (copies landed), `empty` (all consumers have read a slot), `done` (before shared memory is reused),
  `turn` (a consumer's turn to multiply: without turns all make operands at the same time, and tensor cores rest).
- Splits: with `splits` > 1 several blocks share the rows of the matrix. Two form a cluster, each adding a part of the
  result from both blocks' shared memory. More (clusters of 3, 4 and 8 were measured to leave multiprocessors idle: a
  GPC has 16 or 18) store float32 parts, which XLA adds. Either way in one fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu_large_warp as fast_form
from pallas_kernels.quantized_matmul import mosaic_gpu_portable as portable_form
from pallas_kernels.quantized_matmul.mosaic_gpu_call import describe, zero_rows
from pallas_kernels.quantized_matmul.mosaic_gpu_large_warp import (
    FEATURES,
    LOADER_REGISTERS,
    REGISTERS,
    STRIPS,
    X_TILE,
    Problem,
    Tiling,
    fitted,
    staging_fits,
)
from pallas_kernels.quantized_matmul.stack import one_bias
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor


def call(
    x_MI: jax.Array,
    weight: QuantizedTensor,
    layer=None,
    bias=None,
    *,
    tiling: Tiling,
    portable: bool = False,
    after=None,
) -> jax.Array:
    """[M, O] = x · weight + bias in x's dtype; weight in layout "mosaic_gpu", x in its stored row order.

    `portable` and `after`: as in `mosaic_gpu_small.call`.
    """
    rows = x_MI.shape[0]
    properties, inputs = describe(x_MI, weight, layer, bias, after, portable)
    tiling = fitted(tiling, properties["strips"], layout.chunks(x_MI.shape[1]), weight.group_size)
    problem = Problem(**properties, tiling=tiling)
    if not staging_fits(problem.tiling):
        raise ValueError(f"{problem.tiling} has too few slots for the result on its way out: give it more slots.")
    if problem.parts:
        inputs.pop("bias", None)
        parts_SMO = _compiled(problem, tuple(inputs), portable)(*inputs.values())
        total_MO = functools.reduce(jnp.add, [parts_SMO[split] for split in range(parts_SMO.shape[0])])
        total_MO = total_MO[:rows, : weight.out_features]
        bias_O = one_bias(bias, layer)
        return (total_MO if bias_O is None else total_MO + bias_O.astype(jnp.float32)).astype(x_MI.dtype)
    return _compiled(problem, tuple(inputs), portable)(*inputs.values())[:rows, : weight.out_features]


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
    if tiling.turns:
        scratch["turn"] = plgpu.Barrier(num_arrivals=1, num_barriers=tiling.warpgroups)
    if not problem.symmetric:
        rows = zero_rows(problem.groups, columns)
        scratch["zeros_smem"] = plgpu.SMEM((*ring, rows, columns), jnp.uint8)

    def kernel(*refs, **scratch):
        inputs = dict(zip(names, refs[:-1], strict=True))
        _body(problem, inputs, refs[-1], scratch, portable)

    shape = (problem.rows, problem.out_features)
    if portable:
        shape = (-(-problem.rows // tiling.rows) * tiling.rows, problem.strips * layout.STRIP)
    grid = (-(-problem.strips // problem.block_strips), -(-problem.rows // tiling.rows))
    names_ = ("block", "rows")
    if problem.parts:
        shape, dtype = (tiling.splits, *shape), jnp.dtype(jnp.float32)
        grid, names_ = (*grid, tiling.splits), (*names_, "split")
    cluster = {"cluster": (tiling.splits,), "cluster_names": ("split",)} if problem.cluster else {}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=grid,
        grid_names=names_,
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
        plgpu.copy_gmem_to_smem(inputs["x"].at[pl.ds(row, tiling.rows), columns], scratch["x_smem"].at[slot], barrier)
        for part in range(tiling.chunks):
            group = lax.div((stage * tiling.chunks + part) * layout.CHUNK, problem.group_size)
            for name in ("scales", "zeros"):
                if name in inputs:
                    source = weight(name).at[
                        pl.ds(group, problem.groups),
                        pl.ds(strip * layout.STRIP, problem.block_strips * layout.STRIP),
                    ]
                    target = scratch[f"{name}_smem"].at[slot, part, pl.ds(0, problem.groups)]
                    plgpu.copy_gmem_to_smem(source, target, barrier)

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

        consume = portable_form.consume if portable else _consume
        finish = portable_form.finish_transposed if portable else fast_form.finish
        sums = consume(problem, scratch, warpgroup, count, wait, release, _turn(tiling, scratch, warpgroup))
        if tiling.turns:  # the last consumer's last turn ends with the first one's
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(scratch["turn"].at[0]))
        first = block * problem.block_strips * layout.STRIP
        plgpu.barrier_arrive(scratch["done"])
        plgpu.barrier_wait(scratch["done"])
        out = out_gmem.at[lax.axis_index("split")] if problem.parts else out_gmem
        if problem.bias_stacked and "bias" in inputs:
            inputs["bias"] = weight("bias")
        finish(problem, sums, scratch, inputs, out, warpgroup, strip * layout.STRIP, first, row)


def _turn(tiling: Tiling, scratch, warpgroup):
    """(what waits for this consumer's turn at a chunk, what gives the turn to the next)."""
    if not tiling.turns:
        return (lambda number: None), (lambda: None)

    def take(number):
        """`number`: of the chunk; the first consumer begins."""
        pl.when((number > 0) | (warpgroup > 0))(lambda: plgpu.barrier_wait(scratch["turn"].at[warpgroup]))

    def give():
        plgpu.barrier_arrive(scratch["turn"].at[lax.rem(warpgroup + 1, tiling.warpgroups)])

    return take, give


def _consume(problem: Problem, scratch, warpgroup, count, wait, release, turn):
    """[64, rows] float32: this warpgroup's columns of the block's stages."""
    tiling, (take, give) = problem.tiling, turn
    shape, depth = (FEATURES, tiling.rows), layout.CHUNK // problem.pieces

    def operand(slot, part, piece):
        """A piece of a chunk as wgmma's operand A."""
        strips, columns = pl.ds(warpgroup * STRIPS, STRIPS), pl.ds(warpgroup * FEATURES, FEATURES)
        refs = {"packed": scratch["packed_smem"].at[slot, part, strips]}
        if not tiling.scale_sums:
            refs["scales"] = scratch["scales_smem"].at[slot, part, :, columns]
        if not problem.symmetric:
            refs["zeros"] = scratch["zeros_smem"].at[slot, part, pl.ds(0, problem.groups), columns]
        return fast_form.cast(problem, refs, piece)

    def operands(slot, part, index):
        """Of a chunk's pieces: each made when it is asked for or, with turns, all before this consumer's turn."""
        made = (operand(slot, part, piece) for piece in range(problem.pieces))
        if tiling.turns:
            made = list(made)
            take(index * tiling.chunks + part)
        return made

    def multiply(accumulator, slot, part, piece, values):
        """Starts the products of a piece."""
        x = scratch["x_smem"].at[slot, :, pl.ds(part * layout.CHUNK + piece * depth, depth)]
        plgpu.wgmma(accumulator, values, x.T)

    if tiling.scale_sums:

        def step(index, total):
            slot = wait(index)

            def products(*accumulators):
                for part in range(tiling.chunks):
                    for piece, values in enumerate(operands(slot, part, index)):
                        group = part * problem.groups + piece * problem.groups // problem.pieces
                        multiply(accumulators[group], slot, part, piece, values)
                    if tiling.turns:
                        plgpu.wgmma_wait(0)
                        give()
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
                for piece, values in enumerate(operands(slot, part, index)):
                    multiply(accumulator, slot, part, piece, values)
                if tiling.turns:
                    plgpu.wgmma_wait(problem.pieces - 1)  # the next consumer's products queue behind the last piece's
                    give()
            plgpu.wgmma_wait(0)
            release(slot)

        return accumulator[...]

    return pl.run_scoped(scope, plgpu.ACC(shape))

"""Many rows of x on Hopper: weights dequantized into wgmma's register operand, x from shared memory.

A block owns 64 columns of the matrix for each of its consumer warpgroups and a tile of x's rows; the product is
computed transposed, [columns, rows of x], so that few rows cost little. One more warpgroup loads.

- Loads: the last warpgroup, one chunk of 128 matrix rows after another into a ring of slots.
- Computes: a consumer turns packed words into operand A in registers and multiplies by x's tile (operand B).
- Scales: `scale_sums` multiplies each group's sums in float32 (exact, for few rows of x); otherwise weights are scaled
  in x's type before the product.
- Barriers: `full` (copies landed), `empty` (all consumers have read a slot), `done` (before shared memory is reused).
- Splits: with `splits` > 1 several blocks, a cluster, share the rows of the matrix, each adding a part of the result
  from all blocks' shared memory in one fixed order.
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
    PIECES,
    REGISTERS,
    STRIPS,
    X_TILE,
    Problem,
    Tiling,
    fitted,
    staging_fits,
)
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
    properties, inputs = describe(x_MI, weight, layer, bias, after, portable)
    tiling = fitted(tiling, properties["strips"], layout.chunks(x_MI.shape[1]), weight.group_size)
    problem = Problem(**properties, tiling=tiling)
    if not staging_fits(problem.tiling):
        raise ValueError(f"{problem.tiling} has too few slots for the result on its way out: give it more slots.")
    return _compiled(problem, tuple(inputs), portable)(*inputs.values())[: x_MI.shape[0], : weight.out_features]


@functools.lru_cache(maxsize=256)
def _compiled(problem: Problem, names: tuple[str, ...], portable: bool):
    tiling = problem.tiling
    columns = problem.block_strips * layout.STRIP
    dtype = jnp.dtype(problem.dtype)
    scratch = {
        "x_smem": plgpu.SMEM((tiling.slots, tiling.rows, layout.CHUNK), dtype, transforms=X_TILE),
        "packed_smem": plgpu.SMEM((tiling.slots, problem.block_strips, 64 * problem.bits), jnp.int32),
        "scales_smem": plgpu.SMEM((tiling.slots, problem.groups, columns), jnp.dtype(problem.scale_dtype)),
        "full": plgpu.Barrier(num_arrivals=3 if problem.symmetric else 4, num_barriers=tiling.slots),
        "empty": plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.slots),
        "done": plgpu.Barrier(num_arrivals=tiling.warpgroups),
    }
    if not problem.symmetric:
        rows = zero_rows(problem.groups, columns)
        scratch["zeros_smem"] = plgpu.SMEM((tiling.slots, rows, columns), jnp.uint8)

    def kernel(*refs, **scratch):
        inputs = dict(zip(names, refs[:-1], strict=True))
        _body(problem, inputs, refs[-1], scratch, portable)

    shape = (problem.rows, problem.out_features)
    if portable:
        shape = (-(-problem.rows // tiling.rows) * tiling.rows, problem.strips * layout.STRIP)
    grid = (-(-problem.strips // problem.block_strips), -(-problem.rows // tiling.rows))
    names_ = ("block", "rows")
    cluster = {"cluster": (tiling.splits,), "cluster_names": ("split",)} if tiling.splits > 1 else {}
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
    first_chunk, count = jnp.int32(0), jnp.int32(problem.chunks)
    if tiling.splits > 1:
        first_chunk = lax.axis_index("split") * problem.split_chunks
        count = jnp.minimum(problem.split_chunks, problem.chunks - first_chunk)
    layer = problem.static_layer
    if problem.stacked and layer is None:
        layer = inputs["layer"][0]

    def weight(name):
        return inputs[name] if layer is None else inputs[name].at[layer]

    def fetch(index, slot):
        barrier, chunk = scratch["full"].at[slot], first_chunk + index
        plgpu.copy_gmem_to_smem(
            weight("packed").at[chunk, pl.ds(strip, problem.block_strips)],
            scratch["packed_smem"].at[slot],
            barrier,
            oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )
        x = inputs["x"].at[pl.ds(row, tiling.rows), pl.ds(chunk * layout.CHUNK, layout.CHUNK)]
        plgpu.copy_gmem_to_smem(x, scratch["x_smem"].at[slot], barrier)
        groups = pl.ds(lax.div(chunk * layout.CHUNK, problem.group_size), problem.groups)
        columns = pl.ds(strip * layout.STRIP, problem.block_strips * layout.STRIP)
        for name in ("scales", "zeros"):
            if name in inputs:
                target = scratch[f"{name}_smem"].at[slot, pl.ds(0, problem.groups)]
                plgpu.copy_gmem_to_smem(weight(name).at[groups, columns], target, barrier)

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
            (plgpu.commit_smem if portable else fast_form.meet)()  # every warp has read the slot
            plgpu.barrier_arrive(scratch["empty"].at[slot])

        consume = portable_form.consume if portable else _consume
        finish = portable_form.finish_transposed if portable else fast_form.finish
        sums = consume(problem, scratch, warpgroup, count, wait, release)
        first = block * problem.block_strips * layout.STRIP
        plgpu.barrier_arrive(scratch["done"])
        plgpu.barrier_wait(scratch["done"])
        if problem.bias_stacked:
            inputs["bias"] = weight("bias")
        finish(problem, sums, scratch, inputs, out_gmem, warpgroup, strip * layout.STRIP, first, row)


def _consume(problem: Problem, scratch, warpgroup, count, wait, release):
    """[64, rows] float32: this warpgroup's columns of the block's chunks.

    A chunk is multiplied in two pieces: while tensor cores multiply one, this warpgroup makes the next one's operand.
    """
    tiling = problem.tiling
    shape, depth = (FEATURES, tiling.rows), layout.CHUNK // PIECES

    def operand(slot, piece):
        """A piece of a chunk as wgmma's operand A."""
        strips, columns = pl.ds(warpgroup * STRIPS, STRIPS), pl.ds(warpgroup * FEATURES, FEATURES)
        refs = {"packed": scratch["packed_smem"].at[slot, strips]}
        if not tiling.scale_sums:
            refs["scales"] = scratch["scales_smem"].at[slot, :, columns]
        if not problem.symmetric:
            refs["zeros"] = scratch["zeros_smem"].at[slot, pl.ds(0, problem.groups), columns]
        return fast_form.cast(problem, refs, piece)

    def multiply(accumulator, slot, piece, values):
        """Starts the products of a piece."""
        x = scratch["x_smem"].at[slot, :, pl.ds(piece * depth, depth)]
        plgpu.wgmma(accumulator, values, x.T)

    if tiling.scale_sums:

        def step(index, carry, last=False):
            total, values = carry
            slot = lax.rem(index, tiling.slots)

            def products(*accumulators):
                multiply(accumulators[0], slot, 0, values)
                multiply(accumulators[-1], slot, 1, operand(slot, 1))
                following = ()
                if not last:
                    plgpu.wgmma_wait(1)
                    following = (operand(wait(index + 1), 0),)
                plgpu.wgmma_wait(0)
                return *(accumulator[...] for accumulator in accumulators), *following

            results = pl.run_scoped(products, *[plgpu.ACC(shape)] * problem.groups)
            for group in range(problem.groups):
                scales = plgpu.load(
                    scratch["scales_smem"].at[slot, group, pl.ds(warpgroup * FEATURES, FEATURES)],
                    layout=plgpu.Layout.WGMMA.reduce(1),
                )
                total = total + results[group] * lax.broadcast_in_dim(scales.astype(jnp.float32), shape, [0])
            release(slot)
            return total if last else (total, results[-1])

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        carry = lax.fori_loop(0, count - 1, step, (zeros, operand(wait(0), 0)))
        return step(count - 1, carry, last=True)

    def scope(accumulator):
        @pl.loop(0, count)
        def _(index):
            slot = wait(index)
            multiply(accumulator, slot, 0, operand(slot, 0))
            plgpu.wgmma_wait(1)

            @pl.when(index > 0)  # the chunk before is done with
            def _():
                release(lax.rem(index - 1, tiling.slots))

            multiply(accumulator, slot, 1, operand(slot, 1))
            plgpu.wgmma_wait(1)

        plgpu.wgmma_wait(0)
        release(lax.rem(count - 1, tiling.slots))
        return accumulator[...]

    return pl.run_scoped(scope, plgpu.ACC(shape))

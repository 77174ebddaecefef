"""Few rows of x on Hopper: every multiprocessor streams its columns' weights once, whole columns in one block.

A block owns `strips` · 16 columns of the matrix and all of its rows. Its warpgroups take stages of 512 rows in turn,
each through a ring of its own in shared memory; each of the four warps of a warpgroup multiplies one chunk of 128 rows
of a stage. Columns stay whole inside a block, so sums meet in shared memory and no block waits for another.

- Loads: the warpgroup that consumes a slot refills it (contiguous bulk copies, no tensor maps), all slots at the start.
- Computes: weights are operand A, straight from the packed words (`layout_mosaic_gpu`); x is operand B by ldmatrix;
  q − zero is exact in 16 bits; each group's sums are scaled in float32.
- Barriers: `full` (one a slot: copies landed), `done` (each warpgroup has stored its partial sums).
- Stores: all threads add the partial sums of all warps in one fixed order, then the bias.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu_portable as portable_form
from pallas_kernels.quantized_matmul import mosaic_gpu_small_warp as fast_form
from pallas_kernels.quantized_matmul.mosaic_gpu_call import describe, zero_rows
from pallas_kernels.quantized_matmul.mosaic_gpu_small_warp import STAGE, WARPS, X_PADDING, X_TILE, Problem, Tiling
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

    `portable` swaps the two pieces that the interpreter cannot run (`multiply`, `finish`) for plain ones. `after`:
    see `mosaic_gpu_call.describe`.
    """
    properties, inputs = describe(x_MI, weight, layer, bias, after, portable)
    tiling = dataclasses.replace(tiling, strips=min(tiling.strips, properties["strips"]))
    problem = Problem(**properties, tiling=tiling)
    return _compiled(problem, tuple(inputs), portable)(*inputs.values())[:, : weight.out_features]


@functools.lru_cache(maxsize=256)
def _compiled(problem: Problem, names: tuple[str, ...], portable: bool):
    tiling = problem.tiling
    multiply, finish = (
        (portable_form.multiply, portable_form.finish) if portable else (fast_form.multiply, fast_form.finish)
    )
    ring = (tiling.warpgroups, tiling.slots)
    scratch = {
        "packed_smem": plgpu.SMEM((*ring, WARPS, tiling.strips, 64 * problem.bits), jnp.int32),
        "x_smem": plgpu.SMEM((*ring, problem.rows, STAGE + X_PADDING), jnp.dtype(problem.dtype)),
        "scales_smem": plgpu.SMEM((*ring, problem.group_rows, problem.columns), jnp.dtype(problem.scale_dtype)),
        "partial_smem": plgpu.SMEM((tiling.warpgroups * WARPS, problem.rows, problem.partial_stride), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=_arrivals(problem, WARPS), num_barriers=tiling.warpgroups * tiling.slots),
        "done": plgpu.Barrier(num_arrivals=tiling.warpgroups),
    }
    if problem.x_tiled:
        shape = (*ring, 8 * problem.row_tiles, STAGE)
        scratch["x_smem"] = plgpu.SMEM(shape, jnp.dtype(problem.dtype), transforms=X_TILE)
    if not problem.symmetric:
        rows = zero_rows(problem.group_rows, problem.columns)
        scratch["zeros_smem"] = plgpu.SMEM((*ring, rows, problem.columns), jnp.uint8)

    columns = problem.strips * layout.STRIP if portable else problem.out_features

    def kernel(*refs, **scratch):
        inputs = dict(zip(names, refs[:-1], strict=True))
        _body(problem, inputs, refs[-1], scratch, multiply, finish)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((problem.rows, columns), jnp.dtype(problem.dtype)),
        grid=(-(-problem.strips // tiling.strips),),
        grid_names=("block",),
        num_threads=tiling.warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=f"quantized_matmul_w{problem.bits}_m{problem.rows}",
    )


def _arrivals(problem: Problem, chunks: int) -> int:
    """Copies that fill a slot with so many chunks."""
    return chunks + (1 if problem.x_tiled else problem.rows) + (1 if problem.symmetric else 2)


def _body(problem: Problem, inputs, out_gmem, scratch, multiply, finish):
    tiling, stages = problem.tiling, problem.stages
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    # The last block starts earlier where strips do not divide evenly; columns it shares are stored by their owner.
    strip = jnp.minimum(block * tiling.strips, problem.strips - tiling.strips)
    layer = problem.static_layer
    if problem.stacked and layer is None:
        layer = inputs["layer"][0]

    def weight(name):
        return inputs[name] if layer is None else inputs[name].at[layer]

    def slot_refs(slot):
        names = ("packed_smem", "x_smem", "scales_smem", "zeros_smem")
        return {name: scratch[name].at[warpgroup, slot] for name in names if name in scratch}

    def copy_stage(stage, slot, chunks: int):
        barrier, refs = scratch["full"].at[warpgroup * tiling.slots + slot], slot_refs(slot)
        bulk = functools.partial(plgpu.copy_gmem_to_smem, barrier=barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
        for index in range(chunks):
            chunk = stage * WARPS + index
            bulk(weight("packed").at[chunk, pl.ds(strip, tiling.strips)], refs["packed_smem"].at[index])
        width = pl.ds(0, chunks * layout.CHUNK)
        if problem.x_tiled:  # rows past the last are filled with zeros
            rows = pl.ds(lax.axis_index("block") * 0, 8 * problem.row_tiles)
            source = inputs["x"].at[rows, pl.ds(stage * STAGE, STAGE)]
            plgpu.copy_gmem_to_smem(source, refs["x_smem"], barrier)
        else:
            for row in range(problem.rows):
                source = inputs["x"].at[row, pl.ds(stage * STAGE, chunks * layout.CHUNK)]
                bulk(source, refs["x_smem"].at[row, width])
        first_group = lax.div(stage * STAGE, problem.group_size)
        for name in ("scales", "zeros"):
            if name in inputs:
                source = weight(name).at[
                    pl.ds(first_group, problem.group_rows), pl.ds(strip * layout.STRIP, problem.columns)
                ]
                target = refs[f"{name}_smem"].at[pl.ds(0, problem.group_rows)]
                plgpu.copy_gmem_to_smem(source, target, barrier)
        for _ in range(_arrivals(problem, WARPS) - _arrivals(problem, chunks)):
            plgpu.barrier_arrive(barrier)

    def fetch(stage, slot):
        remainder = problem.chunks % WARPS
        if not remainder:
            copy_stage(stage, slot, WARPS)
        elif stages == 1:
            copy_stage(stage, slot, remainder)
        else:
            pl.when(stage < stages - 1)(lambda: copy_stage(stage, slot, WARPS))
            pl.when(stage == stages - 1)(lambda: copy_stage(stage, slot, remainder))

    for slot in range(tiling.slots):
        stage = warpgroup + slot * tiling.warpgroups
        if (slot + 1) * tiling.warpgroups <= stages:
            fetch(stage, slot)
        elif slot * tiling.warpgroups < stages:
            pl.when(stage < stages)(functools.partial(fetch, stage, slot))

    refills = tiling.slots * tiling.warpgroups < stages

    def step(index, sums):
        slot, stage = lax.rem(index, tiling.slots), warpgroup + index * tiling.warpgroups
        plgpu.barrier_wait(scratch["full"].at[warpgroup * tiling.slots + slot])
        sums = multiply(problem, slot_refs(slot), stage, sums)
        if refills:
            following = stage + tiling.slots * tiling.warpgroups

            @pl.when(following < stages)
            def _():
                plgpu.commit_smem()  # all four warps have read the slot
                fetch(following, slot)

        return sums

    sums = jnp.zeros((64, 8 * problem.row_tiles * tiling.strips), jnp.float32)
    sums = plgpu.layout_cast(sums, plgpu.Layout.WGMMA)
    count = lax.div(stages - warpgroup + tiling.warpgroups - 1, tiling.warpgroups)
    sums = lax.fori_loop(0, count, step, sums)
    first = block * problem.columns
    if problem.bias_stacked:
        inputs["bias"] = weight("bias")
    finish(problem, sums, scratch, inputs, out_gmem, warpgroup, strip * layout.STRIP, first)

"""Plain forms of the pieces of `mosaic_gpu_small` and `mosaic_gpu_large` that the GPU interpreter cannot run.

Same arguments and meaning; copies, rings and barriers around them are the kernels' own.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu_large_warp as large
from pallas_kernels.quantized_matmul import mosaic_gpu_small_warp as small


def multiply(problem: small.Problem, refs, stage, sums):
    """`mosaic_gpu_small_warp.multiply` in plain operations."""
    strips, columns, tiles = problem.tiling.strips, problem.columns, problem.row_tiles
    x = refs["x_smem"][...].astype(jnp.float32)[: problem.rows]
    q = layout.integers(refs["packed_smem"][...], problem.bits).astype(jnp.float32)
    scales = refs["scales_smem"][...].astype(jnp.float32)
    zeros = refs["zeros_smem"][...].astype(jnp.float32) if "zeros_smem" in refs else None
    parts = []
    for warp in range(small.WARPS):
        rows = layout.CHUNK // problem.groups
        part = jnp.zeros((columns, problem.rows), jnp.float32)
        for group in range(problem.groups):
            start = warp * layout.CHUNK + group * rows
            if problem.group_size <= layout.CHUNK:
                row = warp * problem.groups + group
            else:
                first = lax.div(stage * small.STAGE, problem.group_size)
                row = lax.div(stage * small.STAGE + warp * layout.CHUNK, problem.group_size) - first
            minus = float(2 ** (problem.bits - 1)) if zeros is None else zeros[row]
            values = q[start : start + rows] - minus
            product = jnp.dot(values.T, x[:, start : start + rows].T, precision=lax.Precision.HIGHEST)
            part = part + product * scales[row][:, None]
        part = jnp.where(stage * small.WARPS + warp < problem.chunks, part, 0.0)
        part = jnp.pad(part, ((0, 0), (0, 8 * tiles - problem.rows)))
        parts.append(part.reshape(strips, layout.STRIP, 8 * tiles).swapaxes(0, 1).reshape(layout.STRIP, -1))
    return sums + jnp.concatenate(parts)


def finish(problem: small.Problem, sums, scratch, inputs, out_gmem, warpgroup, start, first):
    """`mosaic_gpu_small_warp.finish` in plain operations."""
    strips, tiles = problem.tiling.strips, problem.row_tiles
    parts = sums.reshape(small.WARPS, layout.STRIP, strips, 8 * tiles)[..., : problem.rows]
    parts = parts.transpose(0, 3, 2, 1).reshape(small.WARPS, problem.rows, problem.columns)
    partial = scratch["partial_smem"]
    partial[pl.ds(warpgroup * small.WARPS, small.WARPS), :, pl.ds(0, problem.columns)] = parts
    plgpu.barrier_arrive(scratch["done"])
    plgpu.barrier_wait(scratch["done"])

    @pl.when(warpgroup == 0)
    def _():
        total = partial[...][..., : problem.columns].sum(0)
        for strip in range(strips):
            column = start + strip * layout.STRIP

            @pl.when(column >= first)
            def _(strip=strip, column=column):
                value = total[:, strip * layout.STRIP : (strip + 1) * layout.STRIP]
                columns = pl.ds(column, layout.STRIP)
                if "bias" in inputs:
                    value = value + inputs["bias"][columns].astype(jnp.float32)
                out_gmem[:, columns] = value.astype(out_gmem.dtype)


def consume(problem: large.Problem, scratch, warpgroup, count, wait, release):
    """`mosaic_gpu_large._consume` in plain operations."""
    tiling, depth = problem.tiling, layout.CHUNK // problem.groups

    def step(index, total):
        slot = wait(index)
        packed = scratch["packed_smem"][slot, pl.ds(warpgroup * large.STRIPS, large.STRIPS)]
        q = layout.integers(packed[None], problem.bits).astype(jnp.float32)
        for group in range(problem.groups):
            columns = pl.ds(warpgroup * large.FEATURES, large.FEATURES)
            minus = float(2 ** (problem.bits - 1))
            if not problem.symmetric:
                minus = scratch["zeros_smem"][slot, group, columns].astype(jnp.float32)
            values = q[group * depth : (group + 1) * depth] - minus
            x = scratch["x_smem"][slot, :, pl.ds(group * depth, depth)]
            product = jnp.dot(values.T, x.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
            total = total + product * scratch["scales_smem"][slot, group, columns].astype(jnp.float32)[:, None]
        release(slot)
        return total

    return lax.fori_loop(0, count, step, jnp.zeros((large.FEATURES, tiling.rows), jnp.float32))


def finish_transposed(problem: large.Problem, sums, scratch, inputs, out_gmem, warpgroup, start, first, row):
    """`mosaic_gpu_large_warp.finish` in plain operations, one split; the result has room for whole tiles."""
    del scratch
    for strip in range(large.STRIPS):
        column = start + warpgroup * large.FEATURES + strip * layout.STRIP

        @pl.when(column >= first)
        def _(strip=strip, column=column):
            value = sums[strip * layout.STRIP : (strip + 1) * layout.STRIP].T
            if "bias" in inputs:
                value = value + inputs["bias"][pl.ds(column, layout.STRIP)].astype(jnp.float32)
            out_gmem[pl.ds(row, problem.tiling.rows), pl.ds(column, layout.STRIP)] = value.astype(out_gmem.dtype)

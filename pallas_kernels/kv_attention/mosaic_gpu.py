"""Decode attention on Hopper and newer NVIDIA GPUs: one Pallas Mosaic GPU kernel a layer.

The tiles of all slots and heads, counted by the lengths on the device, form one list that the resident blocks share
evenly; a block walks its part with a ring of TMA copies running ahead over the borders of slots and heads. An item (slot
and key/value head) that lies in several parts is merged by the last block to finish one, in a fixed order.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_attention import mosaic_gpu_tile as tiles
from pallas_kernels.kv_attention.mosaic_gpu_merge import FastMerge
from pallas_kernels.kv_attention.mosaic_gpu_schedule import Schedule
from pallas_kernels.kv_attention.tensor import KVArrays

HOPPER_AND_NEWER = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "GB200", "GB300")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What tuning chooses.

    Attributes:
        blocks: 16-token blocks a warp; a tile is 64 times as many tokens.
        stages: tiles in flight a block.
        workers: blocks of the grid: multiprocessors times blocks that fit on one.
    """

    blocks: int = 1
    stages: int = 4
    workers: int = 264


def build(shape: tiles.TileShape, plan: Plan, dims, window, table_slots, merge=None, interpret=None, whole=True):
    """The kernel as a function of arrays.

    Args:
        shape: static facts of the arithmetic.
        plan: tuned choices.
        dims: (B, G, S).
        window: sliding window, or None.
        table_slots: leading size of the rotary tables (1 or B); 0 without a key bias.
        merge: the arithmetic, `FastMerge` by default; a portable one under the interpreter.
        interpret: interpreter parameters.
        whole: the last block merges an item. Without it (under the interpreter, which has no atomics) slices stay.

    Returns:
        f(query, keys, values, scales, lengths, layer, counters, bias) → (out, partial, statistics).
    """
    merge = merge or FastMerge(shape)
    slots, kv_heads, length = dims
    schedule = Schedule(slots, kv_heads, length, shape.tokens, plan.workers, window)
    items, tokens, share, K = slots * kv_heads, shape.tokens, shape.share, shape.head_dim
    scaled, biased, workers, stages = shape.quantized, shape.bias_dtype is not None, plan.workers, plan.stages

    def body(query, keys, values, scales, lengths, layer, counters, bias, out, partial, statistics, smem, barriers):
        worker = lax.axis_index("worker")
        layer = layer[0]
        total, slot, before = merge.locate(schedule, lengths, worker)
        begin = schedule.first_of(worker, total)
        todo = schedule.first_of(worker + 1, total) - begin
        count, first = schedule.tiles_of(lengths, slot)
        cursor = (slot, (begin - before) // count, (begin - before) % count, count, first)

        def issue(stage, cursor):
            slot, head, tile, _, first = cursor
            row = pl.ds((tile + first) * tokens, tokens)
            barrier = barriers.at[stage]
            plgpu.copy_gmem_to_smem(keys.at[layer, slot, head, row], smem["keys"].at[stage], barrier)
            plgpu.copy_gmem_to_smem(values.at[layer, slot, head, row], smem["values"].at[stage], barrier)
            for source, name in zip(scales, ("key_scales", "key_minimums", "value_scales", "value_minimums")):
                plgpu.copy_gmem_to_smem(source.at[layer, slot, head, row], smem[name].at[stage], barrier)
            plgpu.copy_gmem_to_smem(query.at[slot, head], smem["query"].at[stage], barrier)
            if biased:
                table = slot if table_slots > 1 else 0
                for source, name in zip(bias[1:], ("cos", "sin")):
                    plgpu.copy_gmem_to_smem(source.at[table, (tile + first) * tokens], smem[name].at[stage], barrier)

        ahead = cursor
        for stage in range(stages):

            @pl.when(stage < todo)
            def _(ahead=ahead, stage=stage):
                issue(stage, ahead)

            ahead = schedule.advance(lengths, ahead)
        if biased and table_slots == 1:
            merge.build_table(bias[1], bias[2], jnp.int32(0), smem["table"])

        def segment(carry):
            done, cursor, ahead = carry
            slot, head, tile, count, first = cursor
            run = jnp.minimum(count - tile, todo - done)
            stage = done % stages
            plgpu.barrier_wait(barriers.at[stage])
            table = slot if table_slots > 1 else jnp.int32(0)
            start_bias = None
            if biased:
                if table_slots > 1:
                    merge.build_table(bias[1], bias[2], table, smem["table"])
                start_bias = (bias[0], head, bias[1], bias[2], table, smem["turned"])
            setup, state = merge.start(smem["query"].at[stage], start_bias)
            valid = jnp.clip(lengths[slot], 1, length)
            oldest = jnp.int32(0) if window is None else valid - window

            def step(index, carry):
                state, ahead = carry
                stage = (done + index) % stages

                @pl.when(index > 0)
                def _():
                    plgpu.barrier_wait(barriers.at[stage])

                base = (tile + index + first) * tokens
                names = ("key_scales", "key_minimums", "value_scales", "value_minimums") if scaled else ()
                tile_bias = None
                if biased:
                    tile_bias = [smem[name].at[stage] for name in ("cos", "sin")]
                    tile_bias += [smem[name] for name in ("turned", "table", "scratch")]
                state = merge.tile(
                    setup,
                    state,
                    smem["keys"].at[stage],
                    smem["values"].at[stage],
                    [smem[name].at[stage] for name in names],
                    oldest - base,
                    valid - base,
                    tile_bias,
                )
                plgpu.commit_smem()

                @pl.when(done + index + stages < todo)
                def _():
                    issue(stage, ahead)

                return state, schedule.advance(lengths, ahead)

            state, ahead = lax.fori_loop(0, run, step, (state, ahead))
            item = slot * kv_heads + head
            complete = run == count
            merge.finish(
                state,
                smem["scratch"],
                out,
                partial,
                statistics,
                row=item * share,
                slice_index=worker + item,
                complete=complete.astype(jnp.int32),
            )
            if whole:

                @pl.when(jnp.logical_not(complete))
                def _():
                    start = begin + done - tile
                    low, high = schedule.worker_of(start, total), schedule.worker_of(start + count - 1, total)
                    last = merge.arrive(counters, item, high - low + 1, smem["scratch"])

                    @pl.when(last == 1)
                    def _():
                        merge.combine(
                            out, partial, statistics, row=item * share, first=low + item, count=high - low + 1
                        )

            after = (slot, head, tile + run - 1, count, first)
            return done + run, schedule.advance(lengths, after), ahead

        lax.while_loop(lambda carry: carry[0] < todo, segment, (jnp.int32(0), cursor, ahead))

    cache = jnp.uint8 if shape.quantized else jnp.dtype(shape.dtype)
    smem = {
        "keys": plgpu.SMEM((stages, tokens, K), cache, transforms=tiles.cache_transforms(shape)),
        "values": plgpu.SMEM((stages, tokens, K), cache, transforms=tiles.cache_transforms(shape)),
        "query": plgpu.SMEM((stages, share, K), jnp.dtype(shape.dtype)),
        "scratch": plgpu.SMEM((shape.scratch,), jnp.float32),
    }
    if scaled:
        for name in ("key_scales", "key_minimums", "value_scales", "value_minimums"):
            smem[name] = plgpu.SMEM((stages, tokens), jnp.float16)
    if biased:
        smem["cos"] = smem["sin"] = plgpu.SMEM((stages, K // 2), jnp.float32)
        smem["turned"] = plgpu.SMEM((share, K // 2, 2), jnp.float32)
        smem["table"] = plgpu.SMEM((shape.table,), jnp.int32)
    copies = 3 + 4 * scaled + 2 * biased
    slices = workers + items
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((items * share, K), jnp.dtype(shape.dtype)),
            jax.ShapeDtypeStruct((slices, share, K), jnp.float32),
            jax.ShapeDtypeStruct((slices, share, 2), jnp.float32),
        ),
        grid=(workers,),
        grid_names=("worker",),
        scratch_types=dict(smem=smem, barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=stages)),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="decode_attention",
        interpret=interpret,
    )
    return kernel


def attend_decode(
    query_BHK,
    kv: KVArrays,
    layer,
    lengths_B,
    *,
    scale,
    key_bias_GK=None,
    key_rotary=None,
    sliding_window=None,
    active_length=None,
    plan=Plan(),
):
    """One new token a slot over the cache; see `op.attend_decode`."""
    del active_length
    B, H, K = query_BHK.shape
    _, _, G, S, _ = kv.keys.shape
    shape = tiles.TileShape(
        K,
        H // G,
        plan.blocks,
        kv.quantized,
        str(query_BHK.dtype),
        scale,
        None if key_bias_GK is None else str(key_bias_GK.dtype),
    )
    bias = () if key_bias_GK is None else (key_bias_GK, *key_rotary)
    kernel = build(shape, plan, (B, G, S), sliding_window, key_rotary[0].shape[0] if bias else 0)
    scales = (kv.key_scales, kv.key_minimums, kv.value_scales, kv.value_minimums) if kv.quantized else ()
    out, _, _ = kernel(
        query_BHK.reshape(B, G, H // G, K),
        kv.keys,
        kv.values,
        scales,
        lengths_B,
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.zeros(B * G, jnp.int32),
        bias,
    )
    return out.reshape(B, H, K)

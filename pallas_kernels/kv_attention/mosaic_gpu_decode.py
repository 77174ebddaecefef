"""Decode attention on Hopper GPUs: one Pallas Mosaic GPU kernel a layer, over the 8-bit and the 16-bit cache.

A block walks its part of the list of tiles (`mosaic_gpu_schedule`) with a ring of TMA copies that runs ahead over the
borders of slots and heads; each byte of the cache is read once. An item (slot and key/value head) that lies in several
parts is merged by the last block to finish one (`mosaic_gpu_merge`). Arithmetic: `mosaic_gpu_tile`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_attention import mosaic_gpu_tuned
from pallas_kernels.kv_attention.mosaic_gpu_fragments import TileShape, cache_transforms
from pallas_kernels.kv_attention.mosaic_gpu_merge import FastMerge
from pallas_kernels.kv_attention.mosaic_gpu_schedule import Schedule
from pallas_kernels.kv_attention.share import hide_empty, merge_slices, turned_back
from pallas_kernels.kv_attention.tensor import KVArrays

MULTIPROCESSORS = 132  # of an H100 SXM; a chip with others only divides its work less evenly
SHARED_BYTES = 227 * 1024  # a multiprocessor's, of which each block takes 1 KB beside its own
SCALES = ("key_scales", "key_minimums", "value_scales", "value_minimums")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What tuning chooses.

    Attributes:
        blocks: 16-token blocks a warp; a tile is 64 times as many tokens.
        stages: tiles in flight a block.
        workers: blocks of the grid.
    """

    blocks: int
    stages: int
    workers: int


@functools.cache
def tuned() -> list[dict]:
    """The searched table, best match first: see `plan_for`.

    Raises:
        ValueError: it is damaged.
    """
    return mosaic_gpu_tuned.read(mosaic_gpu_tuned.PATH)


@functools.cache
def plan_for(slots: int, kv_heads: int, length: int, share: int, head_dim: int, quantized: bool, biased: bool) -> Plan:
    """Tile, ring and grid for a shape: the first entry of the tuned table that matches, its stages cut to what fits."""
    facts = dict(share=share, head_dim=head_dim, quantized=quantized, biased=biased)
    entry = next(row for row in tuned() if mosaic_gpu_tuned.matches(row["when"], facts))
    return planned(entry, slots, kv_heads, length, **facts)


def planned(entry, slots: int, kv_heads: int, length: int, share: int, head_dim: int, quantized, biased) -> Plan:
    """The plan of a table's entry for a shape.

    The grid is what `_microseconds` says is fastest with every slot full, up to the tuned number of blocks resident.
    """
    blocks, stages, resident = (entry[name] for name in mosaic_gpu_tuned.NUMBERS)
    shape = TileShape(head_dim, share, blocks, quantized, "bfloat16", 1.0, "bfloat16" if biased else None)
    while resident * (shared_bytes(shape, stages) + 1024) > SHARED_BYTES:
        stages, resident = (stages - 1, resident) if stages > 2 or resident == 1 else (stages, resident - 1)
    items, tiles = slots * kv_heads, math.ceil(length / shape.tokens)
    most = min(resident * MULTIPROCESSORS, items * tiles)
    workers = min(range(1, most + 1), key=lambda workers: _microseconds(shape, items, tiles, workers))
    return Plan(blocks, stages, workers)


def _microseconds(shape: TileShape, items: int, tiles: int, workers: int) -> float:
    """A rough model, fitted to an H100: memory or one block's pace, then what starting and merging segments costs.

    With equal lengths W blocks and n items make W + n − gcd(W, n) segments; items lie whole in blocks if W divides n.
    """
    memory = items * tiles * 2 * shape.tokens * shape.head_dim * shape.itemsize / 2.8e6
    memory *= 1 + 0.3 * max(0, 1 - workers / MULTIPROCESSORS)
    stream = max(memory, -(-items * tiles // workers) * 1.0 * shape.blocks)
    segments = (workers + items - math.gcd(workers, items)) / workers
    merging = 1.5 + 0.8 * math.ceil(workers / items / 8) if items % workers else 0.0
    return stream + 1.5 * segments + merging


def _aligned(count: int, size: int) -> int:
    """`count` elements of `size` bytes, and as many more as make whole 128 bytes: where TMA may write a stage."""
    return next(more for more in range(count, count + 128) if more * size % 128 == 0)


def shared_bytes(shape: TileShape, stages: int) -> int:
    """Shared memory of a block."""
    stage = 2 * shape.tokens * shape.head_dim * shape.itemsize
    stage += 2 * shape.head_dim * _aligned(shape.share, 2 * shape.head_dim) + 8 * shape.tokens * shape.quantized
    stage += 2 * 4 * _aligned(shape.head_dim // 2, 4) * (shape.bias_dtype is not None)
    terms = 4 * shape.share * shape.head_dim * (shape.bias_dtype is not None)
    return stages * stage + terms + 4 * shape.scratch + 1024


def build(
    shape: TileShape,
    plan: Plan,
    dims,
    window,
    table_slots: int,
    arithmetic=None,
    interpret=None,
    whole=True,
    sliced=False,
):
    """The kernel as a function of arrays.

    Args:
        shape: static facts of the arithmetic.
        plan: tuned choices.
        dims: (B, G, S).
        window: sliding window, or None.
        table_slots: leading size of the rotary tables (1 or B); 0 without a key bias.
        arithmetic: the seam: `FastMerge`, or a portable twin under the interpreter.
        interpret: interpreter parameters.
        whole: whether the last block merges an item; otherwise (the interpreter has no atomics) its slices stay.
        sliced: every item stays a slice, for `share.merge_slices`; the bias then comes with four tables.

    Returns:
        f(query [B, G, share, K], keys, values, scales (4 or none), lengths [B], layers ([1], or two for a stacked
        bias), counters [B·G] of zeros, bias ([G, K] or stacked, cos, sin) or none; of a share
        two tables of the first tile, turned back to position 0, before the cache's) → (out [B·H, K],
        partial [W + B·G, share, K], statistics [W + B·G, share, 2]). Item i's slice of block w lies at w + i.
    """
    arithmetic = arithmetic or FastMerge(shape)
    slots, kv_heads, length = dims
    schedule = Schedule(slots, kv_heads, length, shape.tokens, plan.workers, window)
    items, tokens, share, K, stages = slots * kv_heads, shape.tokens, shape.share, shape.head_dim, plan.stages
    biased = shape.bias_dtype is not None
    names = SCALES if shape.quantized else ()

    def asked(smem, stage):
        return smem["query"].at[stage, pl.ds(0, share)]

    def turn(smem, name, stage):
        return smem[name].at[stage, pl.ds(0, K // 2)]

    def body(query, keys, values, scales, lengths, layers, counters, bias, out, partial, statistics, smem, barriers):
        worker, layer = lax.axis_index("worker"), layers[0][0]
        if len(layers) == 2:
            bias = (bias[0].at[layers[1][0]], *bias[1:])
        total, slot, before = arithmetic.locate(schedule, lengths, worker)
        begin = schedule.first_of(worker, total)
        todo = schedule.first_of(worker + 1, total) - begin
        count, first = schedule.tiles_of(lengths, slot)
        cursor = (slot, lax.div(begin - before, count), lax.rem(begin - before, count), count, first)

        def copy(stage, cursor):
            slot, head, tile, _, first = cursor
            row, barrier = (tile + first) * tokens, barriers.at[stage]
            cached = ((keys, "keys"), (values, "values"), *zip(scales, names, strict=True))
            for source, name in cached:
                where = source.at[layer, slot, head, pl.ds(row, tokens)]
                plgpu.copy_gmem_to_smem(where, smem[name].at[stage], barrier)
            plgpu.copy_gmem_to_smem(query.at[slot, head], asked(smem, stage), barrier)
            if biased:
                table = slot if table_slots > 1 else 0
                for source, name in zip(bias[-2:], ("cos", "sin"), strict=True):
                    plgpu.copy_gmem_to_smem(source.at[table, row], turn(smem, name, stage), barrier)

        def issue(stage, cursor):
            @plgpu.warp_map  # the other warps skip the copies' address arithmetic
            def _(warp):
                pl.when(warp == 0)(functools.partial(copy, stage, cursor))

        ahead = cursor
        for stage in range(stages):
            pl.when(stage < todo)(functools.partial(issue, stage, ahead))
            ahead = schedule.advance(lengths, ahead)
        zero = jnp.int32(0)
        shared_table = arithmetic.table(*bias[1:3], zero) if biased and table_slots == 1 else None

        def segment(carry):
            done, cursor, ahead = carry
            slot, head, tile, count, first = cursor
            run = lax.min(count - tile, todo - done)
            stage = lax.rem(done, stages)
            plgpu.barrier_wait(barriers.at[stage])
            start_bias, table = None, shared_table
            if biased:
                if table_slots > 1:
                    table = arithmetic.table(*bias[1:3], slot)
                start_bias = (bias[0], head, smem["terms"])
            setup, state = arithmetic.start(asked(smem, stage), start_bias)
            valid = lax.clamp(1, lengths[slot], length)
            oldest = zero if window is None else valid - window

            def step(index, carry):
                state, ahead = carry
                stage = lax.rem(done + index, stages)

                @pl.when(index > 0)
                def _():
                    plgpu.barrier_wait(barriers.at[stage])

                base = (tile + index + first) * tokens
                tile_bias = None
                if biased:
                    tile_bias = (table, turn(smem, "cos", stage), turn(smem, "sin", stage))
                    tile_bias += (smem["terms"], smem["scratch"])
                state = arithmetic.tile(
                    setup,
                    state,
                    smem["keys"].at[stage],
                    smem["values"].at[stage],
                    [smem[name].at[stage] for name in names],
                    oldest - base,
                    valid - base,
                    tile_bias,
                )
                plgpu.commit_smem()  # all warps have read the stage before it is filled again
                pl.when(done + index + stages < todo)(functools.partial(issue, stage, ahead))
                return state, schedule.advance(lengths, ahead)

            state, ahead = lax.fori_loop(0, run, step, (state, ahead))
            item = slot * kv_heads + head
            complete = jnp.int32(0) if sliced else (run == count).astype(jnp.int32)
            arithmetic.finish(
                state,
                smem["scratch"],
                out,
                partial,
                statistics,
                row=item * share,
                slice_index=worker + item,
                complete=complete,
            )
            if whole and not sliced:

                @pl.when(run < count)
                def _():
                    start = begin + done - tile
                    low, high = schedule.worker_of(start, total), schedule.worker_of(start + count - 1, total)
                    parts = high - low + 1
                    last = arithmetic.arrive(counters, item, parts, smem["scratch"])

                    @pl.when(last == 1)
                    def _():
                        arithmetic.combine(out, partial, statistics, row=item * share, first=low + item, count=parts)

            after = schedule.advance(lengths, (slot, head, tile + run - 1, count, first))
            return done + run, after, ahead

        lax.while_loop(lambda carry: carry[0] < todo, segment, (zero, cursor, ahead))

    cache = jnp.uint8 if shape.quantized else jnp.dtype(shape.dtype)
    smem = {name: plgpu.SMEM((stages, tokens), jnp.float16) for name in names}
    for name in ("keys", "values"):
        smem[name] = plgpu.SMEM((stages, tokens, K), cache, transforms=cache_transforms(shape))
    smem["query"] = plgpu.SMEM((stages, _aligned(share, 2 * K), K), jnp.dtype(shape.dtype))
    smem["scratch"] = plgpu.SMEM((shape.scratch,), jnp.float32)
    if biased:
        smem["cos"] = smem["sin"] = plgpu.SMEM((stages, _aligned(K // 2, 4)), jnp.float32)
        smem["terms"] = plgpu.SMEM((share, K // 2, 2), jnp.float32)
    copies = 3 + len(names) + 2 * biased
    slices = plan.workers + items
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((items * share, K), jnp.dtype(shape.dtype)),
            jax.ShapeDtypeStruct((slices, share, K), jnp.float32),
            jax.ShapeDtypeStruct((slices, share, 2), jnp.float32),
        ),
        grid=(plan.workers,),
        grid_names=("worker",),
        scratch_types=dict(smem=smem, barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=stages)),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="decode_attention",
        interpret=interpret,
    )


def attend_decode(
    query_BHK,
    kv: KVArrays,
    layer,
    lengths_B,
    *,
    scale: float,
    key_bias_GK=None,
    key_bias_layer=None,
    key_rotary=None,
    sliding_window: int | None = None,
    active_length: int | None = None,
    plan: Plan | None = None,
    counters=None,
    share: bool = False,
):
    """One new token a slot over the cache; see `op.attend_decode`. A length below 1 counts as 1.

    `active_length` is not needed: each slot's own length bounds what is read. `plan` overrides the tuned choice.
    `counters`, int32 [B·G] of zeros, come back to zero: one array made outside a loop over layers saves a fill in each.
    """
    del active_length
    B, H, K = query_BHK.shape
    _, _, G, S, _ = kv.keys.shape
    biased, queries = key_bias_GK is not None, H // G
    if biased and not kv.quantized:
        raise ValueError("key_bias_GK: a 16-bit cache holds keys with their bias; expected None.")
    if not kv.quantized and kv.keys.dtype != query_BHK.dtype:
        raise ValueError(
            f"kv: a 16-bit cache of {kv.keys.dtype} with queries of {query_BHK.dtype}; expected one dtype."
        )
    if biased and key_rotary[0].dtype != jnp.float32:
        raise ValueError(f"key_rotary: tables of {key_rotary[0].dtype}; expected float32.")
    plan = plan or plan_for(B, G, S, queries, K, kv.quantized, biased)
    bias_dtype = str(key_bias_GK.dtype) if biased else None
    shape = TileShape(K, queries, plan.blocks, kv.quantized, str(query_BHK.dtype), float(scale), bias_dtype)
    kernel = build(
        shape,
        plan,
        (B, G, S),
        sliding_window,
        key_rotary[0].shape[0] if biased else 0,
        sliced=share,
    )
    bias = (key_bias_GK, *key_rotary) if biased else ()
    if biased and share:
        bias = (key_bias_GK, *turned_back(*key_rotary, shape.tokens)[:2], *key_rotary)
    layers = (layer,) if key_bias_layer is None else (layer, key_bias_layer)
    lengths_B = lengths_B.astype(jnp.int32)
    out, partial, statistics = kernel(
        query_BHK.reshape(B, G, queries, K),
        kv.keys,
        kv.values,
        tuple(getattr(kv, name) for name in SCALES) if kv.quantized else (),
        lengths_B,
        [jnp.asarray(index, jnp.int32).reshape(1) for index in layers],
        jnp.zeros(B * G, jnp.int32) if counters is None else counters,
        bias,
    )
    if not share:
        return out.reshape(B, H, K)
    top, total = FastMerge.natural(statistics[..., 0]), statistics[..., 1]
    schedule = Schedule(B, G, S, shape.tokens, plan.workers, None)
    attended, log_total = merge_slices(schedule, lengths_B, partial, top, total)
    return hide_empty(attended.reshape(B, H, K), log_total.reshape(B, H), lengths_B)

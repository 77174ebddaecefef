"""How partial softmaxes of decode attention become one: the four warps of a block, then the blocks of an item.

A partial result is outputs Σ w·v, the maximum M its weights 2^(x − M) refer to, and their sum. Whoever merges does so
in a fixed order, so that a result never depends on timing. The last block to arrive at an item's counter merges it; the
counter wraps to zero by itself.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.mosaic_gpu_fragments import (
    WARPGROUP,
    Thread,
    TileShape,
    bag_layout,
    channel_of_output,
    scalar,
    unbag,
)
from pallas_kernels.kv_attention.mosaic_gpu_schedule import locate
from pallas_kernels.kv_attention.mosaic_gpu_tile import FastTile

_REF, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT


class FastMerge(FastTile):
    """`FastTile` with the division of the work and the merging of what the tiles left."""

    locate = staticmethod(locate)

    def finish(self, state, scratch, out, partial, statistics, *, row, slice_index, complete):
        """Merges the warps. A complete item goes to `out`, else its part to `partial` and `statistics`.

        Args:
            state: of the last `tile`.
            scratch: shared memory float32 [TileShape.scratch].
            out: global memory [rows, K], the queries' rows.
            partial: global memory float32 [slices, share, K].
            statistics: global memory float32 [slices, share, 2]: maximum and sum.
            row: int32, the item's first row of `out`.
            slice_index: int32, where in `partial`.
            complete: int32, 1 if this block did all of the item.
        """
        shape = self.shape
        dtype = str(out.dtype)

        @plgpu.inline_mgpu(arg_types=(bag_layout(shape.state), _REF, _REF, _REF, _REF, _SCALAR, _SCALAR, _SCALAR))
        def emit(ctx, state, scratch, out, partial, statistics, row, slice_index, complete):
            del ctx
            pointers = [utils.memref_ptr(ref) for ref in (scratch, out, partial, statistics)]
            _finish(shape, dtype, unbag(state), pointers, scalar(row), scalar(slice_index), scalar(complete))

        emit(state, scratch, out, partial, statistics, row, slice_index, complete)

    def arrive(self, counters, item, expected, scratch):
        """Counts this block in at an item; 1 (int32 scalar, in all threads) if it is the last of `expected`."""

        @plgpu.inline_mgpu(
            arg_types=(_REF, _SCALAR, _SCALAR, _REF),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
        )
        def emit(ctx, counters, item, expected, scratch):
            del ctx
            pointers = utils.memref_ptr(counters), utils.memref_ptr(scratch)
            last = _arrive(*pointers, scalar(item), scalar(expected))
            return mgpu.FragmentedArray.splat(last, (), is_signed=True)

        return emit(counters, item, expected, scratch)

    def combine(self, out, partial, statistics, *, row, first, count):
        """Merges `count` slices from `first` on into the item's rows of `out`."""
        shape = self.shape
        dtype = str(out.dtype)

        @plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF, _SCALAR, _SCALAR, _SCALAR))
        def emit(ctx, out, partial, statistics, row, first, count):
            del ctx
            pointers = [utils.memref_ptr(ref) for ref in (out, partial, statistics)]
            _combine(shape, dtype, *pointers, scalar(row), scalar(first), scalar(count))

        emit(out, partial, statistics, row, first, count)


def _arrive(counters, scratch, item, expected):
    # Thread 0's fence covers what the barrier ordered before it; slices are read from L2, past any stale line.
    w.warpgroup_barrier()

    def count():
        limit = w.iadd(expected, -1)
        w.fence_device()
        before = w.increment_or_wrap(w.element(counters, item, 4), limit)
        w.fence_device()
        w.store_words(scratch, 0, [w.select(w.equal(before, limit), w.i32(1), w.i32(0))])

    w.when(w.equal(w.thread_index(), 0), count)
    w.warpgroup_barrier()
    last = w.load_words(scratch, 0, 1)[0]
    w.warpgroup_barrier()
    return last


def _elements(shape: TileShape, thread):
    """The (query, channel, flat index, in range) of the outputs a thread merges."""
    size = shape.share * shape.head_dim
    for piece in range(-(-size // WARPGROUP)):
        flat = w.iadd(thread.index, piece * WARPGROUP)
        exists = None if (piece + 1) * WARPGROUP <= size else w.less(flat, size)
        flat = w.imin(flat, size - 1)
        yield w.idiv(flat, shape.head_dim), w.irem(flat, shape.head_dim), flat, exists


def _finish(shape: TileShape, dtype, state, pointers, row, slice_index, complete):
    scratch, out, partial, statistics = pointers
    thread = Thread.here()
    outputs = shape.head_dim // 4
    acc, maximum, total, shift = state[:outputs], state[outputs : outputs + 2], state[-4:-2], state[-2:]
    for distance in (4, 8, 16):
        total = [w.add(x, w.shuffle_xor(x, distance)) for x in total]
        shift = [w.add(x, w.shuffle_xor(x, distance)) for x in shift]
    merging = 4 * 4 * 3 * 8  # bytes of the warps' maxima, sums and offsets before their outputs
    column = w.imul(thread.t, 8)

    def write_statistics():
        for kind, values in enumerate((maximum, total, shift)):
            w.store_floats(scratch, w.iadd(w.imul(thread.warp, 96), column, kind * 32), values)

    w.when(w.equal(thread.g, 0), write_statistics)
    w.warpgroup_barrier()

    highest = [w.f32(-3e38)] * 2
    for other in range(4):
        theirs = w.load_floats(scratch, w.iadd(column, other * 96), 2)
        highest = [w.maximum(x, y) for x, y in zip(highest, theirs, strict=True)]
    factor = [w.exp2(w.sub(x, y)) for x, y in zip(maximum, highest, strict=True)]
    for c in range(2):
        query = w.iadd(w.imul(thread.t, 2), c)

        def write_outputs(c=c, query=query):
            base = w.imul(w.iadd(w.imul(thread.warp, shape.share), query), shape.head_dim * 4)
            for position in range(shape.head_dim // 8):
                value = acc[position // 2 * 4 + position % 2 * 2 + c]
                where = w.iadd(base, w.imul(channel_of_output(shape, position, thread), 4), merging)
                w.store_floats(scratch, where, [w.mul(value, factor[c])])

        w.when(w.less(query, shape.share), write_outputs)
    w.warpgroup_barrier()

    for query, channel, flat, exists in _elements(shape, thread):
        parts = []
        for other in range(4):
            where = w.iadd(w.imul(query, 4), other * 96)
            parts.append([w.load_floats(scratch, w.iadd(where, kind * 32))[0] for kind in range(3)])
        top = parts[0][0]
        for part in parts[1:]:
            top = w.maximum(top, part[0])
        value, weight = w.f32(0.0), w.f32(0.0)
        for other, (their_maximum, their_total, their_shift) in enumerate(parts):
            ratio = w.exp2(w.sub(their_maximum, top))
            where = w.iadd(w.imul(flat, 4), other * shape.share * shape.head_dim * 4 + merging)
            value = w.add(value, w.fma(their_shift, ratio, w.load_floats(scratch, where)[0]))
            weight = w.fma(their_total, ratio, weight)

        def write(query=query, channel=channel, flat=flat, value=value, weight=weight, top=top):
            def write_whole():
                where = w.iadd(w.imul(w.iadd(row, query), shape.head_dim), channel)
                _store(out, where, w.divide(value, weight), dtype)

            def write_slice():
                where = w.iadd(w.imul(slice_index, shape.share * shape.head_dim), flat)
                _store(partial, where, value, "float32")
                where = w.imul(w.iadd(w.imul(slice_index, shape.share), query), 2)

                def write_statistics():
                    _store(statistics, where, top, "float32")
                    _store(statistics, w.iadd(where, 1), weight, "float32")

                w.when(w.equal(channel, 0), write_statistics)

            w.when(w.equal(complete, 1), write_whole)
            w.when(w.equal(complete, 0), write_slice)

        w.when(exists, write)
    w.warpgroup_barrier()


def _store(pointer, index, value, dtype):
    """Stores the `index`-th element; the byte offset is 64-bit, for outputs may be large."""
    w.store_float_as(w.element(pointer, index, 4 if dtype == "float32" else 2), 0, value, dtype)


_TOGETHER = 8  # slices read at once: their latencies overlap


def _combine(shape: TileShape, dtype, out, partial, statistics, row, first, count):
    """A thread merges four neighbouring channels at a time, all slices in order."""
    thread = Thread.here()
    quarters = shape.share * shape.head_dim // 4
    elements = []
    for piece in range(-(-quarters // WARPGROUP)):
        at = w.iadd(thread.index, piece * WARPGROUP)
        exists = None if (piece + 1) * WARPGROUP <= quarters else w.less(at, quarters)
        at = w.imul(w.imin(at, quarters - 1), 4)
        elements.append((w.idiv(at, shape.head_dim), at, exists))

    def merge(begin, carried):
        slices = [w.iadd(begin, index) for index in range(_TOGETHER)]
        inside = [w.less(index, count) for index in slices]
        places = [w.iadd(first, w.imin(index, w.iadd(count, -1))) for index in slices]
        read = []
        for query, at, _ in elements:
            whose = [w.iadd(w.imul(place, shape.share), query) for place in places]
            where = [w.iadd(w.imul(place, shape.share * shape.head_dim), at) for place in places]
            facts = [w.load_device(w.element(statistics, index, 8), 0, 2) for index in whose]
            read.append((facts, [w.load_device(w.element(partial, index, 4), 0, 4) for index in where]))
        new = []
        for index, (facts, slices) in enumerate(read):
            top, weight, *values = carried[6 * index : 6 * index + 6]
            highest = top
            for their_top, _ in facts:
                highest = w.maximum(highest, their_top)
            ratio = w.exp2(w.sub(top, highest))
            weight, values = w.mul(weight, ratio), [w.mul(value, ratio) for value in values]
            for valid, (their_top, their_weight), theirs in zip(inside, facts, slices, strict=True):
                ratio = w.select(valid, w.exp2(w.sub(their_top, highest)), w.f32(0.0))
                weight = w.fma(their_weight, ratio, weight)
                values = [w.fma(other, ratio, value) for other, value in zip(theirs, values, strict=True)]
            new += [highest, weight, *values]
        return new

    begin = [w.f32(-3e38), *[w.f32(0.0)] * 5] * len(elements)
    merged = w.loop(count, _TOGETHER, begin, merge)
    for index, (_, at, exists) in enumerate(elements):
        _, weight, *values = merged[6 * index : 6 * index + 6]

        def write(at=at, weight=weight, values=values):
            base = w.iadd(w.imul(row, shape.head_dim), at)  # the item's queries are neighbouring rows of `out`
            for channel, value in enumerate(values):
                _store(out, w.iadd(base, channel), w.divide(value, weight), dtype)

        w.when(exists, write)

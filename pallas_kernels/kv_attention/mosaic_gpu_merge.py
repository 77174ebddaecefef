"""How partial softmaxes of decode attention become one: the four warps of a block, then the blocks of an item.

A partial result is outputs Σ w·v, the maximum M its weights 2^(x − M) refer to, and their sum. Whoever merges does so in
a fixed order, so that a result never depends on timing. The last block to arrive at an item's counter merges it; the
counter wraps to zero by itself.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.mosaic_gpu_schedule import locate
from pallas_kernels.kv_attention.mosaic_gpu_tile import (
    WARPGROUP,
    FastTile,
    TileShape,
    _bag_layout,
    _scalar,
    _Thread,
    _unbag,
    channel_of_output,
)

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

        @plgpu.inline_mgpu(arg_types=(_bag_layout(shape.state), _REF, _REF, _REF, _REF, _SCALAR, _SCALAR, _SCALAR))
        def emit(ctx, state, scratch, out, partial, statistics, row, slice_index, complete):
            del ctx
            pointers = [utils.memref_ptr(ref) for ref in (scratch, out, partial, statistics)]
            _finish(shape, dtype, _unbag(state), pointers, _scalar(row), _scalar(slice_index), _scalar(complete))

        emit(state, scratch, out, partial, statistics, row, slice_index, complete)

    def arrive(self, counters, item, expected, scratch):
        """Counts this block in at an item; 1 (int32 scalar, in all threads) if it is the last of `expected`."""

        @plgpu.inline_mgpu(
            arg_types=(_REF, _SCALAR, _SCALAR, _REF),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
        )
        def emit(ctx, counters, item, expected, scratch):
            del ctx
            thread = _Thread.here()
            counters, scratch = utils.memref_ptr(counters), utils.memref_ptr(scratch)
            # Thread 0's fence covers what the barrier ordered before it; slices are read from L2, past any stale line.
            utils.warpgroup_barrier()
            first = scf.IfOp(w.equal(thread.index, 0))
            with ir.InsertionPoint(first.then_block):
                where = w.offset(counters, w.imul(_scalar(item), 4))
                limit = w.iadd(_scalar(expected), -1)
                w.fence_device()
                text = "atom.relaxed.gpu.global.inc.u32 $0, [$1], $2;"
                before = w.asm(text, [w.i32_type()], where, limit, effects=True)
                w.fence_device()
                last = w.select(w.equal(before, limit), w.i32(1), w.i32(0))
                w.store_words(scratch, 0, [last])
                scf.YieldOp([])
            utils.warpgroup_barrier()
            last = w.load_words(scratch, 0, 1)[0]
            utils.warpgroup_barrier()
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
            _combine(shape, dtype, *pointers, _scalar(row), _scalar(first), _scalar(count))

        emit(out, partial, statistics, row, first, count)


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
    thread = _Thread.here()
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
    utils.warpgroup_barrier()

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
    utils.warpgroup_barrier()

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
            whole = scf.IfOp(w.equal(complete, 1), has_else=True)
            with ir.InsertionPoint(whole.then_block):
                where = w.iadd(w.imul(w.iadd(row, query), shape.head_dim), channel)
                _store(out, where, w.arith.divf(value, weight), dtype)
                scf.YieldOp([])
            with ir.InsertionPoint(whole.else_block):
                where = w.iadd(w.imul(slice_index, shape.share * shape.head_dim), flat)
                _store(partial, where, value, "float32")
                where = w.imul(w.iadd(w.imul(slice_index, shape.share), query), 2)

                def write_statistics():
                    _store(statistics, where, top, "float32")
                    _store(statistics, w.iadd(where, 1), weight, "float32")

                w.when(w.equal(channel, 0), write_statistics)
                scf.YieldOp([])

        w.when(exists, write)
    utils.warpgroup_barrier()


def _store(pointer, index, value, dtype):
    """Stores the `index`-th element; the byte offset is 64-bit, for outputs may be large."""
    w.store_float_as(w.element(pointer, index, 4 if dtype == "float32" else 2), 0, value, dtype)


_TOGETHER = 4  # slices read at once, for two elements: their latencies overlap, and registers suffice


def _combine(shape: TileShape, dtype, out, partial, statistics, row, first, count):
    thread = _Thread.here()
    elements = list(_elements(shape, thread))
    for pair in range(0, len(elements), 2):
        _combine_elements(shape, dtype, out, partial, statistics, row, first, count, elements[pair : pair + 2])


def _combine_elements(shape: TileShape, dtype, out, partial, statistics, row, first, count, elements):
    begin = [w.f32(-3e38), w.f32(0.0), w.f32(0.0)] * len(elements)
    loop = scf.ForOp(w.i32(0), count, w.i32(_TOGETHER), begin)
    with ir.InsertionPoint(loop.body):
        carried = list(loop.inner_iter_args)
        slices = [w.iadd(loop.induction_variable, index) for index in range(_TOGETHER)]
        inside = [w.less(index, count) for index in slices]
        places = [w.iadd(first, w.imin(index, w.iadd(count, -1))) for index in slices]
        read = []
        for query, _, flat, _ in elements:
            at = [w.imul(w.iadd(w.imul(place, shape.share), query), 2) for place in places]
            tops = [w.load_device(w.element(statistics, where, 4), 0) for where in at]
            weights = [w.load_device(w.element(statistics, w.iadd(where, 1), 4), 0) for where in at]
            where = [w.iadd(w.imul(place, shape.share * shape.head_dim), flat) for place in places]
            read.append((tops, weights, [w.load_device(w.element(partial, at, 4), 0) for at in where]))
        new = []
        for index, (tops, weights, values) in enumerate(read):
            top, value, weight = carried[3 * index : 3 * index + 3]
            highest = top
            for other in tops:
                highest = w.maximum(highest, other)
            ratio = w.exp2(w.sub(top, highest))
            value, weight = w.mul(value, ratio), w.mul(weight, ratio)
            for valid, their_top, their_weight, their_value in zip(inside, tops, weights, values, strict=True):
                ratio = w.select(valid, w.exp2(w.sub(their_top, highest)), w.f32(0.0))
                value, weight = w.fma(their_value, ratio, value), w.fma(their_weight, ratio, weight)
            new += [highest, value, weight]
        scf.YieldOp(new)
    for index, (query, channel, _, exists) in enumerate(elements):
        _, value, weight = loop.results[3 * index : 3 * index + 3]

        def write(query=query, channel=channel, value=value, weight=weight):
            where = w.iadd(w.imul(w.iadd(row, query), shape.head_dim), channel)
            _store(out, where, w.arith.divf(value, weight), dtype)

        w.when(exists, write)

"""The warps that fill the ring: every byte of weights and cache that a block needs, in the order of the consumers.

They take tiles in turn and never wait for a phase of the layer, only for room, so that memory works on while the blocks meet at barriers.
"""

from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.plan import LOADERS, SLOT_BYTES, STRIP, TOKENS, Matrix, Plan
from pallas_kernels.kv_attention import warp as w



class Ring:
    """Addresses of the ring's slots; a slot is told by its place in the sequence of all slots ever used."""

    def __init__(self, plan: Plan, shared):
        self.plan, self.shared = plan, shared

    def slot(self, sequence):
        """(data, extra, full barrier, empty barrier, parity of this lap)."""
        slots = self.plan.slots
        at = w.irem(sequence, slots)
        return (
            w.offset(self.shared["ring"], w.imul(at, SLOT_BYTES)),
            w.offset(self.shared["extra"], w.imul(at, self.plan.extra_stride)),
            w.offset(self.shared["full"], w.imul(at, 8)),
            w.offset(self.shared["empty"], w.imul(at, 8)),
            w.irem(w.idiv(sequence, slots), 2),
        )


def first_strip(matrix: Matrix, block):
    """Where a block's strips begin in each half; the last block's are shared with the one before."""
    return w.imin(w.imul(block, matrix.block_strips), matrix.half_strips - matrix.block_strips)


def tiles_of(matrix: Matrix, block):
    """Tiles of a block: all or none."""
    active = w.less(w.imul(block, matrix.block_strips), matrix.half_strips)
    return w.select(active, w.i32(matrix.depth * matrix.parts), w.i32(0))


def item_of(plan: Plan, lengths, block, round_: int):
    """A block's part of the cache in a round: (index, exists, row, head, first and last 16 tokens, valid tokens, all).

    The newest token counts, though a block finds it not in the ring.
    """
    index = w.iadd(block, round_ * plan.blocks)
    exists = w.less(index, plan.items * plan.splits)
    index = w.imin(index, plan.items * plan.splits - 1)
    item, split = w.idiv(index, plan.splits), w.irem(index, plan.splits)
    row, head = w.idiv(item, plan.kv_heads), w.irem(item, plan.kv_heads)
    valid = w.imin(w.imax(w.load_words(lengths, w.imul(row, 4), 1)[0], 1), plan.length)
    every = w.idiv(w.iadd(valid, TOKENS - 1), TOKENS)
    start = w.i32(0)
    if plan.window is not None:
        start = w.idiv(w.imax(w.iadd(valid, -plan.window), 0), TOKENS)
    count = w.iadd(every, w.imul(start, -1))
    low = w.iadd(start, w.idiv(w.imul(count, split), plan.splits))
    high = w.iadd(start, w.idiv(w.imul(count, w.iadd(split, 1)), plan.splits))
    return index, exists, row, head, low, high, valid, every


def first_slot(loader, sequence):
    """How many slots from `sequence` on a loader's first one is: a slot is always filled by the same loader."""
    return w.irem(w.iadd(loader, LOADERS, w.imul(w.irem(sequence, LOADERS), -1)), LOADERS)


def load_matrix(plan: Plan, matrix: Matrix, pointers, ring: Ring, loader, lane, block, layer, sequence):
    """Fills slots with a loader's share of a block's tiles; returns the sequence after them."""
    count, strip0 = tiles_of(matrix, block), first_strip(matrix, block)
    kinds = 1 + matrix.groups * (1 if matrix.symmetric else 2)
    row, kind = w.idiv(lane, kinds), w.irem(lane, kinds)
    unit, width = matrix.unit_bytes, matrix.width
    name = matrix.name
    # What a lane copies of a tile: its source's base and strides, its place in the slot and its size.
    group = w.irem(w.imax(w.iadd(kind, -1), 0), matrix.groups)
    is_packed, is_scale = w.equal(kind, 0), w.less(kind, 1 + matrix.groups)
    scale_at = w.iadd(w.imul(row, matrix.extra_bytes), w.imul(group, matrix.scale_bytes))
    zero_at = w.iadd(
        w.imul(row, matrix.extra_bytes), matrix.groups * matrix.scale_bytes, w.imul(group, matrix.zero_bytes)
    )
    extra_at = w.select(is_scale, scale_at, zero_at)
    size = w.select(is_packed, w.i32(width * unit), w.select(is_scale, w.i32(matrix.scale_bytes), w.i32(matrix.zero_bytes)))
    packed_layer = w.element(pointers[f"{name}.packed"], w.imul(layer, matrix.chunks), matrix.stored_strips * unit)
    scales_layer = w.element(pointers[f"{name}.scales"], w.imul(layer, matrix.scale_rows), matrix.columns * 2)
    zeros_layer = scales_layer
    if not matrix.symmetric:
        zeros_layer = w.element(pointers[f"{name}.zeros"], w.imul(layer, matrix.scale_rows), matrix.columns)
    each_half = matrix.parts // matrix.halves
    first = first_slot(loader, sequence)

    def fill(index, carried):
        del carried
        index = w.iadd(index, first)
        part, depth = w.irem(index, matrix.parts), w.idiv(index, matrix.parts)
        data, extra, full, empty, parity = ring.slot(w.iadd(sequence, index))
        d.barrier_wait(empty, w.ixor(parity, 1))
        w.when(w.equal(lane, 0), lambda: d.barrier_expect(full, w.i32(matrix.tile_bytes)))
        w.warp_barrier()
        chunk = w.imin(w.iadd(w.imul(depth, matrix.rows), row), matrix.chunks - 1)
        half, within = w.idiv(part, each_half), w.irem(part, each_half)
        strip = w.iadd(strip0, w.imul(within, width), w.imul(half, matrix.half_strips))
        packed = w.element(packed_layer, w.iadd(w.imul(chunk, matrix.stored_strips), strip), unit)
        if matrix.groups > 1:
            group_row = w.iadd(w.imul(chunk, matrix.groups), group)
        else:
            group_row = w.idiv(w.imul(chunk, 128), matrix.group_size)
        column = w.iadd(w.imul(group_row, matrix.columns), w.imul(strip, STRIP))
        scales = w.element(scales_layer, column, 2)
        zeros = w.element(zeros_layer, column, 1) if not matrix.symmetric else scales
        source = d.pick(is_packed, packed, d.pick(is_scale, scales, zeros))
        target = d.pick(is_packed, w.offset(data, w.imul(row, width * unit)), w.offset(extra, extra_at))
        w.when(w.less(lane, matrix.rows * kinds), lambda: d.bulk_copy(target, source, size, full))
        return []

    w.loop(w.imax(w.iadd(count, w.imul(first, -1)), 0), LOADERS, [], fill)
    return w.iadd(sequence, count)


def load_cache(plan: Plan, pointers, ring: Ring, loader, lane, block, layer, sequence):
    """Fills slots with a loader's share of a block's parts of the cache; returns the sequence after them."""
    itemsize = 1 if plan.quantized else 2
    row_bytes = plan.head_dim * itemsize
    names = ("key_scales", "key_minimums", "value_scales", "value_minimums")
    for round_ in range(plan.item_rounds):
        _, exists, row, head, low, high, _, _ = item_of(plan, pointers["lengths"], block, round_)
        blocks = w.select(exists, w.iadd(high, w.imul(low, -1)), w.i32(0))
        cached = w.imul(w.iadd(layer, plan.first_layer), plan.batch)
        line = w.imul(w.iadd(w.imul(w.iadd(cached, row), plan.kv_heads), head), plan.length)  # tokens before the head's

        first, slots = first_slot(loader, sequence), w.imul(blocks, plan.cache_slots)

        def fill(index, carried, line=line, low=low, sequence=sequence, first=first):
            del carried
            index = w.iadd(index, first)
            token = w.iadd(line, w.imul(w.iadd(low, w.idiv(index, plan.cache_slots)), TOKENS))
            data, extra, full, empty, parity = ring.slot(w.iadd(sequence, index))
            keys, values = (w.element(pointers[name], token, row_bytes) for name in ("keys", "values"))
            d.barrier_wait(empty, w.ixor(parity, 1))
            if plan.quantized:
                copies, total = 6, 2 * TOKENS * row_bytes + 4 * 2 * TOKENS
                source = d.pick(w.equal(lane, 0), keys, values)
                target = w.offset(data, w.imul(lane, TOKENS * row_bytes))
                for which, name in enumerate(names):
                    mine = w.equal(lane, 2 + which)
                    source = d.pick(mine, w.element(pointers[name], token, 2), source)
                    target = d.pick(mine, w.offset(extra, which * 2 * TOKENS), target)
                size = w.select(w.less(lane, 2), w.i32(TOKENS * row_bytes), w.i32(2 * TOKENS))
            else:
                copies, total = 1, TOKENS * row_bytes
                source, target = d.pick(w.equal(w.irem(index, 2), 0), keys, values), data
                size = w.i32(total)
            w.when(w.equal(lane, 0), lambda: d.barrier_expect(full, w.i32(total)))
            w.warp_barrier()
            w.when(w.less(lane, copies), lambda: d.bulk_copy(target, source, size, full))
            return []

        w.loop(w.imax(w.iadd(slots, w.imul(first, -1)), 0), LOADERS, [], fill)
        sequence = w.iadd(sequence, slots)
    return sequence


def load(plan: Plan, pointers, shared, loader, lane, block):
    """All layers; `loader` is the number of this warp among `LOADERS`."""
    ring = Ring(plan, shared)

    def layer_of(layer, carried):
        [sequence] = carried
        for name in ("qkv", "cache", "output", "gate_up", "down"):
            if name in plan.skip:
                continue
            zero = d.load_volatile(shared["zero"])  # see layer._anew
            who = w.iadd(loader, zero), w.iadd(lane, zero), w.iadd(block, zero)
            if name == "cache":
                sequence = load_cache(plan, pointers, ring, *who, layer, sequence)
            else:
                sequence = load_matrix(plan, plan.matrix(name), pointers, ring, *who, layer, sequence)
        return [sequence]

    w.loop(w.i32(plan.layers), 1, [w.i32(0)], layer_of)

"""The warps that fill the ring: every byte of weights and cache that a block needs, in the order of the consumers.

Each serves some of the consuming warps and never waits for a phase of the layer, only for room, so that memory works on
while the blocks meet at barriers.
"""

from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.plan import LOADERS, SLOT_BYTES, STRIP, TOKENS, Matrix, Plan
from pallas_kernels.kv_attention import warp as w


class Ring:
    """Addresses of slots. Each consuming warp has a ring of its own and counts its tiles: `number` is one's place.

    A slot that several warps used would have to be waited for by a parity that another lap shares.
    """

    def __init__(self, plan: Plan, shared):
        self.plan, self.shared = plan, shared

    def slot(self, warp, number):
        """(data, extra, full barrier, empty barrier, parity of this lap)."""
        depth = self.plan.slots // self.plan.warps
        at = w.iadd(w.imul(warp, depth), w.irem(number, depth))
        return (
            w.offset(self.shared["ring"], w.imul(at, SLOT_BYTES)),
            w.offset(self.shared["extra"], w.imul(at, self.plan.extra_stride)),
            w.offset(self.shared["full"], w.imul(at, 8)),
            w.offset(self.shared["empty"], w.imul(at, 8)),
            w.irem(w.idiv(number, depth), 2),
        )


def share_of(plan: Plan, count, warp):
    """How many of a block's tiles a consuming warp takes: the warp-th, and every `warps`-th after it."""
    return w.idiv(w.imax(w.iadd(count, plan.warps - 1, w.imul(warp, -1)), 0), plan.warps)


def first_strip(matrix: Matrix, block):
    """Where a block's strips begin in each half; the last block's are shared with the one before."""
    return w.imin(w.imul(block, matrix.block_strips), matrix.half_strips - matrix.block_strips)


def tiles_of(matrix: Matrix, block):
    """Tiles of a block: all or none."""
    active = w.less(w.imul(block, matrix.block_strips), matrix.half_strips)
    return w.select(active, w.i32(matrix.depth * matrix.parts), w.i32(0))


def item_of(plan: Plan, start, index):
    """The index-th part of the cache: (index, exists, row, head, first and last 16 tokens, valid tokens, all).

    A block's parts lie `blocks` apart. The newest token counts, though a block finds it not in the ring.
    """
    exists = w.less(index, plan.items * plan.splits)
    index = w.imin(index, plan.items * plan.splits - 1)
    item, split = w.idiv(index, plan.splits), w.irem(index, plan.splits)
    row, head = w.idiv(item, plan.kv_heads), w.irem(item, plan.kv_heads)
    before = w.imax(w.load_words(start, w.imul(row, 4), 1)[0], 0)
    valid = w.imin(w.iadd(before, 1), plan.length)
    every = w.idiv(w.iadd(valid, TOKENS - 1), TOKENS)
    oldest = w.i32(0)
    if plan.window is not None:
        oldest = w.idiv(w.imax(w.iadd(valid, -plan.window), 0), TOKENS)
    count = w.iadd(every, w.imul(oldest, -1))
    low = w.iadd(oldest, w.idiv(w.imul(count, split), plan.splits))
    high = w.iadd(oldest, w.idiv(w.imul(count, w.iadd(split, 1)), plan.splits))
    return index, exists, row, head, low, high, valid, every


def load_matrix(plan: Plan, matrix: Matrix, pointers, ring: Ring, loader, lane, block, layer, numbers):
    """Fills slots of a loader's warps with a block's tiles; `numbers` is each warp's place, before and after."""
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
    size = w.select(
        is_packed, w.i32(width * unit), w.select(is_scale, w.i32(matrix.scale_bytes), w.i32(matrix.zero_bytes))
    )
    packed_layer = w.element(pointers[f"{name}.packed"], w.imul(layer, matrix.chunks), matrix.stored_strips * unit)
    scales_layer = w.element(pointers[f"{name}.scales"], w.imul(layer, matrix.scale_rows), matrix.columns * 2)
    zeros_layer = scales_layer
    if not matrix.symmetric:
        zeros_layer = w.element(pointers[f"{name}.zeros"], w.imul(layer, matrix.scale_rows), matrix.columns)
    each_half = matrix.parts // matrix.halves

    def fill(index, warp, number):
        part, depth = w.irem(index, matrix.parts), w.idiv(index, matrix.parts)
        data, extra, full, empty, parity = ring.slot(warp, number)
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

    return _in_turn(plan, loader, count, 1, numbers, fill)


def _in_turn(plan: Plan, loader, count, slots: int, numbers, fill):
    """`fill(tile, warp, slot number)` for a loader's warps, all of a block's tiles in order, `slots` slots a tile."""

    def turn(index, carried):
        del carried
        for place, number in enumerate(numbers):
            warp = w.iadd(loader, LOADERS * place)
            tile = w.iadd(index, warp)
            here = w.iadd(number, w.imul(w.idiv(index, plan.warps), slots))
            w.when(w.less(tile, count), lambda tile=tile, warp=warp, here=here: fill(tile, warp, here))
        return []

    w.loop(count, plan.warps, [], turn)
    return [
        w.iadd(number, w.imul(share_of(plan, count, w.iadd(loader, LOADERS * place)), slots))
        for place, number in enumerate(numbers)
    ]


def load_cache(plan: Plan, pointers, ring: Ring, loader, lane, block, layer, numbers):
    """Fills slots of a loader's warps with a block's parts of the cache; `numbers` as in `load_matrix`."""
    itemsize = 1 if plan.quantized else 2
    row_bytes = plan.head_dim * itemsize
    names = ("key_scales", "key_minimums", "value_scales", "value_minimums")

    def part(index, numbers):
        _, exists, row, head, low, high, _, _ = item_of(plan, pointers["start"], index)
        blocks = w.select(exists, w.iadd(high, w.imul(low, -1)), w.i32(0))
        cached = w.imul(w.iadd(layer, plan.first_layer), plan.batch)
        line = w.imul(w.iadd(w.imul(w.iadd(cached, row), plan.kv_heads), head), plan.length)  # tokens before the head's

        def fill(index, warp, number, line=line, low=low):
            token = w.iadd(line, w.imul(w.iadd(low, index), TOKENS))
            keys, values = (w.element(pointers[name], token, row_bytes) for name in ("keys", "values"))
            for part in range(plan.cache_slots):
                data, extra, full, empty, parity = ring.slot(warp, w.iadd(number, part))
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
                    source, target, size = (keys, values)[part], data, w.i32(total)
                w.when(w.equal(lane, 0), lambda full=full, total=total: d.barrier_expect(full, w.i32(total)))
                w.warp_barrier()
                copy = (target, source, size, full)
                w.when(w.less(lane, copies), lambda copy=copy: d.bulk_copy(*copy))

        return _in_turn(plan, loader, blocks, plan.cache_slots, numbers, fill)

    if plan.direct:
        body = lambda round_, numbers: part(w.iadd(block, w.imul(round_, plan.blocks)), numbers)  # noqa: E731
        return w.loop(w.i32(plan.item_rounds), 1, numbers, body)
    for round_ in range(plan.item_rounds):
        numbers = part(w.iadd(block, round_ * plan.blocks), numbers)
    return numbers


def load(plan: Plan, pointers, shared, loader, lane, block):
    """All layers; `loader` is the number of this warp among `LOADERS`."""
    ring = Ring(plan, shared)

    def layer_of(layer, carried):
        numbers = carried
        for name in ("qkv", "cache", "output", "gate_up", "down"):
            if name in plan.skip:
                continue
            zero = d.load_volatile(shared["zero"])  # see layer._anew
            who = w.iadd(loader, zero), w.iadd(lane, zero), w.iadd(block, zero)
            if name == "cache":
                numbers = load_cache(plan, pointers, ring, *who, layer, numbers)
            else:
                numbers = load_matrix(plan, plan.matrix(name), pointers, ring, *who, layer, numbers)
        return numbers

    w.loop(w.i32(plan.layers), 1, [w.i32(0)] * (plan.warps // LOADERS), layer_of)

"""The warps that compute: the five phases of a layer, with a meeting of all blocks before each.

`reach` is the only place where blocks of a card wait for each other; cards wait for each other in `cards.Exchange`.
"""

from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step import matmul
from pallas_kernels.decode_step.cards import Exchange
from pallas_kernels.decode_step.loader import Ring, first_strip, share_of, tiles_of
from pallas_kernels.decode_step.plan import STRIP, Matrix, Plan
from pallas_kernels.kv_attention import warp as w


class Consumer:
    """One thread's view: who it is, where things are, and how many meetings there were."""

    def __init__(self, plan: Plan, pointers, shared, block, warp, lane):
        self.plan, self.pointers, self.shared = plan, pointers, shared
        self.block, self.warp, self.lane = block, warp, lane
        self.thread = w.iadd(w.imul(warp, 32), lane)
        self.ring = Ring(plan, shared)
        self.results = matmul.results(plan, self.thread)
        self.first = False  # whether a layer's first phase runs

    def meet(self):
        """All consuming warps of the block."""
        d.meet(1, 32 * self.plan.warps)

    def reach(self, meetings):
        """What any block wrote before is there for all after; `meetings` counts this one, and there is no zeroth."""
        if self.first:
            w.when(w.less(0, meetings), lambda: self._reach(meetings))
        else:
            self._reach(meetings)

    def _reach(self, meetings):
        self.meet()
        counter = self.pointers["counters"]

        def wait():
            d.count_up(counter)
            d.await_count(counter, w.imul(meetings, self.plan.blocks))

        w.when(w.equal(self.thread, 0), wait)
        self.meet()

    # -- the rows of x --------------------------------------------------------------------------------------------

    def _pieces(self, width: int):
        """(first element, whether it exists) of the eight neighbouring elements a thread takes in each round."""
        threads, count = 32 * self.plan.warps, width // 8
        for round_ in range(-(-count // threads)):
            index = w.iadd(self.thread, round_ * threads)
            exists = None if (round_ + 1) * threads <= count else w.less(index, count)
            yield w.imul(w.imin(index, count - 1), 8), exists

    def norm_scales(self, name: str, layer):
        """A norm's scale of this thread's elements: read before a meeting, used after it."""
        plan, dtype = self.plan, self.plan.norm_dtype
        size = 4 if dtype == "float32" else 2
        base = w.element(self.pointers[name], w.imul(layer, plan.hidden), size)
        found = []
        for first, _ in self._pieces(plan.hidden):
            words = [w.load_words(base, w.iadd(w.imul(first, size), 16 * i), 4) for i in range(size // 2)]
            found.append([word for four in words for word in four])
        return found

    def put_normed(self, source, scales):
        """x = the RMS norm of `source` [B, D]."""
        plan, x = self.plan, self.shared["x"]
        rows = []
        for row in range(plan.batch):
            words = [
                d.load_fresh(source, w.imul(w.iadd(first, row * plan.hidden), 2), 4)
                for first, _ in self._pieces(plan.hidden)
            ]
            rows.append(words)
        if plan.direct:
            inverses = self._inverses_together([self._squares(pieces) for pieces in rows])
        else:
            inverses = self._inverses(rows)
        for row, (pieces, inverse) in enumerate(zip(rows, inverses, strict=True)):
            for words, scale, (first, exists) in zip(pieces, scales, self._pieces(plan.hidden), strict=True):
                new = []
                for index, word in enumerate(words):
                    values = w.unpack(word, "bf16")
                    if plan.norm_dtype == "float32":
                        factors = [w.as_float(scale[2 * index + e]) for e in range(2)]
                    else:
                        factors = w.unpack(scale[index], "bf16")
                    new.append(
                        w.pack(*(w.mul(w.mul(v, inverse), f) for v, f in zip(values, factors, strict=True)), "bf16")
                    )
                where = w.iadd(w.imul(first, 2), row * plan.x_stride)
                w.when(exists, lambda where=where, new=new: w.store_words(x, where, new))
        self.meet()

    def _squares(self, pieces):
        """A thread's part of the sum of a row's squares."""
        total = w.f32(0.0)
        for words, (_, exists) in zip(pieces, self._pieces(self.plan.hidden), strict=True):
            mine = w.f32(0.0)
            for word in words:
                for value in w.unpack(word, "bf16"):
                    mine = w.fma(value, value, mine)
            total = w.add(total, mine if exists is None else w.select(exists, mine, w.f32(0.0)))
        return total

    def _inverses(self, rows):
        """1 / RMS of each row, one after another."""
        plan, small = self.plan, self.shared["small"]
        for row, pieces in enumerate(rows):
            total = w.float_warp_sum(self._squares(pieces))
            where = w.imul(w.iadd(w.imul(self.warp, plan.batch), row), 4)
            w.when(w.equal(self.lane, 0), lambda where=where, total=total: w.store_floats(small, where, [total]))
        self.meet()
        for row in range(plan.batch):
            total = w.f32(0.0)
            for warp in range(plan.warps):
                total = w.add(total, w.load_floats(small, (warp * plan.batch + row) * 4)[0])
            yield self._inverse(total)

    def _inverses_together(self, sums):
        """The same from threads' sums, for many rows: a lane ends with row lane // 4, so that few shuffles do."""
        plan, lane, small = self.plan, self.lane, self.shared["small"]
        sums = sums + [w.f32(0.0)] * (8 - plan.batch)
        for distance in (16, 8, 4):
            high = w.equal(w.irem(w.idiv(lane, distance), 2), 1)
            low_half, high_half = sums[: len(sums) // 2], sums[len(sums) // 2 :]
            kept = [w.select(high, b, a) for a, b in zip(low_half, high_half, strict=True)]
            given = [w.select(high, a, b) for a, b in zip(low_half, high_half, strict=True)]
            sums = [w.add(a, w.shuffle_xor(b, distance)) for a, b in zip(kept, given, strict=True)]
        total = self._of_four(sums[0])
        w.when(w.equal(w.irem(lane, 4), 0), lambda: w.store_floats(small, self._small(self.warp), [total]))
        self.meet()
        total = w.f32(0.0)
        for warp in range(0, plan.warps, 4):
            total = w.add(total, w.load_floats(small, self._small(w.iadd(w.irem(lane, 4), warp)))[0])
        inverse = w.as_word(self._inverse(self._of_four(total)))
        return [w.as_float(w.broadcast(inverse, 4 * row)) for row in range(plan.batch)]

    def _small(self, warp):
        """Place of a warp's sum of row lane // 4."""
        return w.imul(w.iadd(w.imul(warp, 8), w.idiv(self.lane, 4)), 4)

    def _of_four(self, value):
        """Sum over four neighbouring lanes."""
        for distance in (2, 1):
            value = w.add(value, w.shuffle_xor(value, distance))
        return value

    def _inverse(self, total):
        return d.reciprocal_sqrt(w.fma(total, w.f32(1 / self.plan.hidden), w.f32(self.plan.epsilon)))

    def put_plain(self, source, width: int):
        """x = `source` [B, width]."""
        plan, moved = self.plan, []
        for row in range(plan.batch):
            for first, exists in self._pieces(width):
                words = d.load_fresh(source, w.imul(w.iadd(first, row * width), 2), 4)
                moved.append((w.iadd(w.imul(first, 2), row * plan.x_stride), exists, words))
        for where, exists, words in moved:
            w.when(exists, lambda where=where, words=words: w.store_words(self.shared["x"], where, words))
        self.meet()

    def put_attended(self):
        """x = the parts of attention [B, H · K], merged in order."""
        plan, K = self.plan, self.plan.head_dim
        threads, count = 32 * plan.warps, plan.batch * plan.heads * K // 4
        together = min(plan.splits, 8)
        rounds = -(-count // threads)
        at_once = max(1, 16 // together)  # rounds whose loads are in flight at once
        for first in range(0, rounds, at_once):
            places = []
            for round_ in range(first, min(first + at_once, rounds)):
                index = w.iadd(self.thread, round_ * threads)
                exists = None if (round_ + 1) * threads <= count else w.less(index, count)
                index = w.imin(index, count - 1)
                head, at = w.idiv(index, K // 4), w.imul(w.irem(index, K // 4), 4)  # head of all rows
                row, column = w.idiv(head, plan.heads), w.iadd(w.imul(w.irem(head, plan.heads), K), at)
                target = w.iadd(w.imul(row, plan.x_stride), w.imul(column, 2))
                places.append((head, at, target, exists))
            if plan.splits <= together:
                read = [self._read_parts(w.i32(0), together, head, at) for head, at, _, _ in places]
                merged = [_merged(parts, None) for parts in read]
            else:
                merged = []
                for head, at, _, _ in places:

                    def part(begin, carried, head=head, at=at):
                        return _merged(self._read_parts(begin, together, head, at), carried)

                    start = [w.f32(-3e38), *[w.f32(0.0)] * 5]
                    merged.append(w.loop(w.i32(plan.splits), together, start, part))
            for (_, _, target, exists), (_, weight, *values) in zip(places, merged, strict=True):
                inverse = w.reciprocal(weight)
                values = [w.mul(value, inverse) for value in values]
                words = [w.pack(values[0], values[1], "bf16"), w.pack(values[2], values[3], "bf16")]
                w.when(exists, lambda target=target, words=words: w.store_words(self.shared["x"], target, words))
        self.meet()

    def _read_parts(self, begin, count: int, head, at):
        """(valid or None, maximum, weight, four channels) of parts of one query head."""
        plan, K = self.plan, self.plan.head_dim
        item, query = w.idiv(head, plan.share), w.irem(head, plan.share)
        found = []
        for number in range(count):
            split = w.iadd(begin, number)
            valid = None if plan.splits <= count else w.less(split, plan.splits)
            split = w.imin(split, plan.splits - 1)
            row = w.iadd(w.imul(w.iadd(w.imul(item, plan.splits), split), plan.share), query)
            facts = d.load_fresh(w.element(self.pointers["statistics"], row, 8), 0, 2)
            values = d.load_fresh(w.element(self.pointers["partial"], w.iadd(w.imul(row, K), at), 4), 0, 4)
            found.append((valid, *map(w.as_float, facts), [w.as_float(x) for x in values]))
        return found

    # -- phases ---------------------------------------------------------------------------------------------------

    def multiply(self, matrix: Matrix, number, put, finish, summed_in=None):
        """One projection: `put()` fills x, `finish(row, column)` gives what stores a result from its sums.

        Or `put()` gives a pointer to where x lies in the order of operand B (`matmul.place_of`). Each warp then reads
        a tile's part one tile ahead, so that the L2 cache answers while it computes.
        Sums are one number, or gate and up. `summed_in`: the layer, where the cards' sums are to be added.
        """
        plan, count = self.plan, tiles_of(matrix, self.block)

        def work():
            source = put()
            first = w.imul(first_strip(matrix, self.block), STRIP)
            stores = [finish(row, w.iadd(first, column)) for row, column, _ in self.results(matrix)]
            exchange = None
            if summed_in is not None and plan.cards > 1 and "cards" not in plan.skip:
                exchange = Exchange(plan, self.pointers, matrix, self.block, summed_in)

            mine = w.imax(w.iadd(count, w.imul(self.warp, -1)), 0)

            def fetch(index):
                depth = w.idiv(w.iadd(index, self.warp), matrix.parts)
                return matmul.direct_words(plan, matrix, source, self.lane, depth, w.less(index, mine))

            def step(index, carried):
                sums, words = carried[: 4 * matrix.width], carried[4 * matrix.width :]
                at = w.iadd(index, self.warp)
                data, extra, full, empty, parity = self.ring.slot(self.warp, w.iadd(number, w.idiv(index, plan.warps)))
                following = [] if source is None else fetch(w.iadd(index, plan.warps))
                d.barrier_wait(full, parity)

                def operand_of(row, chunk):
                    if source is None:
                        return matmul.x_operand(plan, self.shared["x"], self.lane, chunk)
                    return [words[word : word + 2] for word in range(16 * row, 16 * (row + 1), 2)]

                depth = w.idiv(at, matrix.parts)
                sums = matmul.tile(plan, matrix, operand_of, data, extra, self.lane, depth, sums)
                w.warp_barrier()
                w.when(w.equal(self.lane, 0), lambda: d.barrier_arrive(empty))
                return [*sums, *following]

            begin = [w.f32(0.0)] * (4 * matrix.width) + ([] if source is None else fetch(w.i32(0)))
            sums = w.loop(mine, plan.warps, begin, step)[: 4 * matrix.width]
            matmul.store_sums(plan, matrix, self.shared["sums"], self.warp, self.lane, sums)
            self.meet()
            finished = list(zip(stores, self.results(matrix), strict=True))
            for store, (row, column, exists) in finished:
                sums = [
                    matmul.gathered(plan, matrix, self.shared["sums"], row, column, half)
                    for half in range(matrix.halves)
                ]
                if exchange is not None:
                    exchange.push(exists, row, w.iadd(first, column), sums[0])
                else:
                    w.when(exists, lambda store=store, sums=sums: store(sums))
            for store, (row, column, exists) in finished if exchange is not None else ():
                exchange.total(exists, row, w.iadd(first, column), lambda total, store=store: store([total]))

        w.when(w.less(0, count), work)
        return w.iadd(number, share_of(plan, count, self.warp))


def _merged(parts, carried):
    """(maximum, weight, four values) of parts of a softmax and what was merged before them."""
    highest = parts[0][1] if carried is None else carried[0]
    for _, top, _, _ in parts:
        highest = w.maximum(highest, top)
    weight, values = w.f32(0.0), [w.f32(0.0)] * 4
    if carried is not None:
        ratio = w.exp2(w.sub(carried[0], highest))
        weight, values = w.mul(carried[1], ratio), [w.mul(value, ratio) for value in carried[2:]]
    for valid, top, theirs, channels in parts:
        ratio = w.exp2(w.sub(top, highest))
        if valid is not None:
            ratio = w.select(valid, ratio, w.f32(0.0))
        weight = w.fma(theirs, ratio, weight)
        values = [w.fma(channel, ratio, value) for channel, value in zip(channels, values, strict=True)]
    return [highest, weight, *values]

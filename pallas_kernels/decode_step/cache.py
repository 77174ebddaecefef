"""The cache's phase: a block's parts of attention, one after another, the newest token's queries, key and value first.

Either a part's newest token, tiles and merge follow each other, the block's warps meeting between; or (`Plan.direct`)
all parts' newest tokens come first and all merges last, and each warp walks through all tiles without meeting another.
"""

from pallas_kernels.decode_step import attention, matmul, newest
from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.consumer import Consumer
from pallas_kernels.decode_step.loader import item_of, share_of
from pallas_kernels.decode_step.plan import TOKENS, Plan
from pallas_kernels.kv_attention import warp as w


def phase(me: Consumer, layer, number, meetings):
    """Parts of attention from `qkv` and the cache, which gets the newest token; the warp's next place in its ring."""
    if me.plan.direct:
        return _merged_last(me, layer, number, meetings)
    for round_ in range(me.plan.item_rounds):
        item = item_of(me.plan, me.pointers["start"], w.iadd(me.block, round_ * me.plan.blocks))
        index, exists, row, _, low, high, _, _ = item
        count = w.select(exists, w.iadd(high, w.imul(low, -1)), w.i32(0))
        # What does not depend on the phase before is read before the meeting.
        biases, first_turn = _early(me, layer, item)
        if round_ == 0:
            me.reach(meetings)

        def work(item=item, index=index, row=row, number=number, biases=biases, first_turn=first_turn):
            _store_newest(me, layer, item, me.shared, lambda job: w.equal(me.warp, job))
            if me.plan.biased and me.plan.table_rows > 1:
                attention.store_table(me.plan, me.shared["table"], *_tables(me), row, me.warp, me.lane)
            me.meet()
            state = _attend(me, item, me.shared, number, biases, first_turn)
            partial, statistics = me.pointers["partial"], me.pointers["statistics"]
            attention.merge(me.plan, state, me.shared, partial, statistics, index, me.warp, me.lane)

        w.when(exists, work)
        number = w.iadd(number, w.imul(share_of(me.plan, count, me.warp), me.plan.cache_slots))
    return number


def _merged_last(me: Consumer, layer, number, meetings):
    plan, warps = me.plan, me.plan.warps
    kept = w.offset(me.shared["x"], plan.scratch_bytes)

    def item_in(round_):
        return item_of(plan, me.pointers["start"], w.iadd(me.block, w.imul(round_, plan.blocks)))

    def early(round_):
        biases, turn = _early(me, layer, item_in(round_))
        return [*(value for pair in biases for value in pair), *turn]

    def shared_in(round_):
        query = w.imul(round_, plan.query_bytes)
        fresh = w.imul(round_, plan.fresh_bytes)
        return me.shared | {
            "query": w.offset(me.shared["query"], query),
            "fresh": w.offset(me.shared["fresh"], fresh),
        }

    def begin(round_, _):
        item = item_in(round_)
        first = w.imul(round_, plan.share + 2)

        def mine(job):
            return w.both(item[1], w.equal(me.warp, w.irem(w.iadd(first, job), warps)))

        _store_newest(me, layer, item, shared_in(round_), mine)
        return []

    def part(round_, carried):
        number, *values = carried
        item = item_in(round_)
        _, exists, row, _, low, high, _, _ = item
        following = early(w.imin(w.iadd(round_, 1), plan.item_rounds - 1))
        if plan.biased and plan.table_rows > 1:
            me.meet()
            attention.store_table(plan, me.shared["table"], *_tables(me), row, me.warp, me.lane)
            me.meet()

        def work():
            biases = [(values[2 * i], values[2 * i + 1]) for i in range(2 if plan.biased else 0)]
            state = _attend(me, item, shared_in(round_), number, biases, values[2 * len(biases) :])
            place = w.iadd(w.imul(round_, warps), me.warp)
            _keep(plan, state, w.offset(kept, w.imul(place, plan.kept_bytes)), me.lane)

        w.when(exists, work)
        count = w.select(exists, w.iadd(high, w.imul(low, -1)), w.i32(0))
        return [w.iadd(number, w.imul(share_of(plan, count, me.warp), plan.cache_slots)), *following]

    values = early(w.i32(0))
    me.reach(meetings)
    w.loop(w.i32(plan.item_rounds), 1, [], begin)
    me.meet()
    number, *_ = w.loop(w.i32(plan.item_rounds), 1, [number, *values], part)
    me.meet()
    for round_, query, at, exists, value, top, weight in _merged(plan, kept, me.thread):
        index = w.iadd(me.block, w.imul(round_, plan.blocks))

        def store(index=index, query=query, at=at, value=value, top=top, weight=weight):
            if "output" in plan.unstaged:
                head = w.iadd(w.imul(w.irem(index, plan.kv_heads), plan.share), query)
                column = w.iadd(w.imul(head, plan.head_dim), at)
                place = matmul.place_of(plan, w.idiv(index, plan.kv_heads), column)
                target, value = w.element(me.pointers["attended"], place, 2), w.mul(value, w.reciprocal(weight))
                w.store_float_as(target, 0, value, "bfloat16")
            else:
                partial, statistics = me.pointers["partial"], me.pointers["statistics"]
                row = w.iadd(w.imul(index, plan.share), query)
                attention.store_part(plan, partial, statistics, row, at, value, top, weight)

        w.when(w.both(exists, w.less(index, plan.items * plan.splits)), store)
    return number


def _tables(me: Consumer):
    return (me.pointers["cos"], me.pointers["sin"]) if me.plan.biased else ()


def _turn(me: Consumer, item, place):
    """The turn of 16 tokens for the keys' bias."""
    table_row = item[2] if me.plan.table_rows > 1 else w.i32(0)
    if not me.plan.biased:
        return []
    return attention.table_row(me.plan, *_tables(me), table_row, w.imul(place, TOKENS), me.lane)


def _early(me: Consumer, layer, item):
    """(the keys' bias, the turn of the warp's first tile) of a part; empty without a bias."""
    plan, biases = me.plan, []
    _, _, _, head, low, _, _, _ = item
    if plan.biased:
        size = 4 if plan.key_bias_dtype == "float32" else 2
        bias = w.element(me.pointers["key_bias"], w.imul(layer, plan.kv_heads * plan.head_dim), size)
        biases = attention.load_bias(plan, bias, head, me.lane)
    return biases, _turn(me, item, w.iadd(low, me.warp))


def _store_newest(me: Consumer, layer, item, shared, mine):
    """Queries, and in the last split the newest key and value, into `shared`; `mine(job)`: whether this warp does it.

    Each job has a warp of its own: queries from the first, value and key from the last.
    """
    plan = me.plan
    _, _, row, head, _, high, valid, every = item
    newest_here, position = w.equal(high, every), w.iadd(valid, -1)
    for which in range(plan.share):
        w.when(
            mine(which % plan.warps),
            lambda which=which: newest.store_query(
                me.pointers, plan, shared, row, head, which, layer, position, me.lane
            ),
        )
    for kind in range(2):
        w.when(
            w.both(newest_here, mine(plan.warps - 1 - kind)),
            lambda kind=kind: newest.store_new(me.pointers, plan, shared, kind, row, head, layer, position, me.lane),
        )


def _attend(me: Consumer, item, shared, number, biases, first_turn):
    """The warp's state after its tiles of a part."""
    plan, lane, warp = me.plan, me.lane, me.warp
    _, _, _, _, low, high, valid, every = item
    query = attention.query_operand(plan, shared["query"], lane)
    terms = attention.bias_terms(plan, shared["query"], biases, lane) if plan.biased else []
    oldest = w.i32(0) if plan.window is None else w.iadd(valid, -plan.window)
    scratch = w.offset(shared["x"], w.imul(warp, 2 * plan.share * 256))

    def step(index, carried):
        state, turn = carried[: attention.state_size(plan)], carried[attention.state_size(plan) :]
        place = w.iadd(low, index, warp)
        at = w.iadd(number, w.imul(w.idiv(index, plan.warps), plan.cache_slots))
        data, extra, full, empty, parity = me.ring.slot(warp, at)
        following = _turn(me, item, w.iadd(place, plan.warps))
        logits = None
        if plan.biased:
            logits = attention.bias_logits(plan, terms, turn, scratch, shared["table"], lane)
        d.barrier_wait(full, parity)
        keys, values, empties = data, w.offset(data, TOKENS * plan.head_dim), [empty]
        if not plan.quantized:
            values, _, full, empty, parity = me.ring.slot(warp, w.iadd(at, 1))
            d.barrier_wait(full, parity)
            empties.append(empty)
        scales = extra if plan.quantized else None
        first = w.imul(place, TOKENS)
        mine = w.iadd(valid, -1, w.imul(first, -1))  # the newest token's row, if it is here
        w.when(w.equal(place, w.iadd(every, -1)), lambda: newest.patch(plan, shared, keys, values, scales, mine, lane))
        low_row, high_row = w.iadd(oldest, w.imul(first, -1)), w.iadd(valid, w.imul(first, -1))
        state = attention.tile(plan, state, query, keys, values, scales, lane, low_row, high_row, logits)
        d.fence_copies()
        w.warp_barrier()
        for barrier in empties:
            w.when(w.equal(lane, 0), lambda barrier=barrier: d.barrier_arrive(barrier))
        return [*state, *following]

    mine = w.imax(w.iadd(high, w.imul(low, -1), w.imul(warp, -1)), 0)
    begin = [*attention.start_state(plan), *first_turn]
    return w.loop(mine, plan.warps, begin, step)[: attention.state_size(plan)]


def _keep(plan: Plan, state, region, lane):
    """A warp's state into shared memory, `Plan.kept_bytes`, for `_merged`."""
    K, outputs = plan.head_dim, plan.head_dim // 4
    acc, maximum = state[:outputs], state[outputs : outputs + 2]
    total, shift = attention.sums_of_rows(state[-4:-2], state[-2:])
    g, t = w.idiv(lane, 4), w.irem(lane, 4)
    facts = w.iadd(w.imul(t, 8), plan.share * K * 4)

    def write_facts():
        w.store_floats(region, facts, maximum)
        w.store_floats(region, w.iadd(facts, 32), total)

    w.when(w.equal(g, 0), write_facts)
    for c in range(2):
        query = w.iadd(w.imul(t, 2), c)

        def write(c=c, query=query):
            for first in range(0, K // 8, 4):
                values = [acc[position // 2 * 4 + position % 2 * 2 + c] for position in range(first, first + 4)]
                place = w.imul(w.iadd(w.imul(query, K), attention.channel(plan, first, g)), 4)
                w.store_floats(region, place, [w.add(value, shift[c]) for value in values])

        w.when(w.less(query, plan.share), write)


def _merged(plan: Plan, region, thread):
    """Yields (round, query, channel, whether it exists, value, maximum, sum) of a block's parts kept in `region`."""
    K, warps, size = plan.head_dim, plan.warps, plan.kept_bytes
    each = plan.share * K
    threads, count = 32 * warps, plan.item_rounds * each
    for turn in range(-(-count // threads)):
        element = w.iadd(thread, turn * threads)
        exists = w.less(element, count)
        element = w.imin(element, count - 1)
        round_, inside = w.idiv(element, each), w.irem(element, each)
        query, at = w.idiv(inside, K), w.irem(inside, K)
        base = w.imul(round_, warps * size)
        facts, values = w.iadd(base, w.imul(query, 4), each * 4), w.iadd(base, w.imul(inside, 4))
        tops = [w.load_floats(region, w.iadd(facts, other * size))[0] for other in range(warps)]
        top = tops[0]
        for theirs in tops[1:]:
            top = w.maximum(top, theirs)
        value = weight = w.f32(0.0)
        for other, theirs in enumerate(tops):
            factor = w.exp2(w.sub(theirs, top))
            value = w.fma(w.load_floats(region, w.iadd(values, other * size))[0], factor, value)
            weight = w.fma(w.load_floats(region, w.iadd(facts, other * size + 32))[0], factor, weight)
        yield round_, query, at, exists, value, top, weight

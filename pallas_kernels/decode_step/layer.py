"""The phases of a layer, one after another, and the loop over the layers."""

from pallas_kernels.decode_step import attention, matmul, newest
from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.consumer import Consumer
from pallas_kernels.decode_step.loader import item_of, share_of
from pallas_kernels.decode_step.plan import TOKENS, Plan
from pallas_kernels.kv_attention import warp as w


def consume(plan: Plan, pointers, shared, block, warp, lane):
    """All layers, from x [B, D] to `hidden` [B, D]."""
    phases = [name for name in ("qkv", "cache", "output", "gate_up", "down") if name not in plan.skip]
    if plan.biased and plan.table_rows == 1:
        tables = pointers["cos"], pointers["sin"]
        attention.store_table(plan, shared["table"], *tables, w.i32(0), warp, lane)

    def layer_of(layer, carried):
        [number] = carried
        meetings = w.imul(layer, len(phases))
        for order, name in enumerate(phases):
            me = Consumer(plan, pointers, shared, *_anew(shared, block, warp, lane))
            me.first = order == 0
            number = _PHASES[name](me, layer, number, w.iadd(meetings, order))
        return [number]

    w.loop(w.i32(plan.layers), 1, [w.i32(0)], layer_of)
    Consumer(plan, pointers, shared, block, warp, lane).meet()

    def leave():  # the last block to leave takes both counters back to zero
        last = plan.blocks - 1
        d.fence_all()
        before = w.increment_or_wrap(w.offset(pointers["counters"], 4), w.i32(last))
        w.when(w.equal(before, last), lambda: d.store_word(pointers["counters"], w.i32(0)))

    w.when(w.both(w.equal(warp, 0), w.equal(lane, 0)), leave)


def _anew(shared, *values):
    """The same values, as if just found: a compiler that knew them would keep what follows from them for all phases."""
    zero = d.load_volatile(shared["zero"])
    block, warp, lane = values
    return w.iadd(block, zero), w.broadcast(w.iadd(warp, zero), 0), w.iadd(lane, zero)


def _source(me: Consumer, layer):
    """What a layer starts from: x, then the layer before."""
    return d.pick(w.equal(layer, 0), me.pointers["x"], me.pointers["hidden"])


def _store_bf16(pointer, row, width: int, column, value):
    w.store_float_as(w.element(pointer, w.iadd(w.imul(row, width), column), 2), 0, value, "bfloat16")


def _load_bf16(pointer, row, width: int, column):
    """An element another block wrote; the word around it is read."""
    index = w.iadd(w.imul(row, width), column)
    word = d.load_fresh(w.element(pointer, w.idiv(index, 2), 4), 0, 1)[0]
    low, high = w.unpack(word, "bf16")
    return w.select(w.equal(w.irem(index, 2), 0), low, high)


def _round(value):
    return w.unpack(w.pack(value, value, "bf16"), "bf16")[0]


def _qkv(me: Consumer, layer, number, meetings):
    plan, matrix = me.plan, me.plan.matrix("qkv")
    scales = me.norm_scales("attention_norm", layer)
    me.reach(meetings)

    def finish(row, column):
        bias = w.f32(0.0)
        if plan.bias_dtype:
            size = 4 if plan.bias_dtype == "float32" else 2
            at = w.iadd(w.imul(layer, matrix.out_features), column)
            bias = w.load_float_of(w.element(me.pointers["qkv_bias"], at, size), 0, plan.bias_dtype)
        return lambda sums: _store_bf16(me.pointers["qkv"], row, matrix.out_features, column, w.add(sums[0], bias))

    return me.multiply(matrix, number, lambda: me.put_normed(_source(me, layer), scales), finish)


def _cache(me: Consumer, layer, number, meetings):
    plan, pointers, shared, lane, warp = me.plan, me.pointers, me.shared, me.lane, me.warp
    tables = (pointers["cos"], pointers["sin"]) if plan.biased else ()
    for round_ in range(plan.item_rounds):
        index, exists, row, head, low, high, valid, every = item_of(plan, pointers["start"], me.block, round_)
        count = w.select(exists, w.iadd(high, w.imul(low, -1)), w.i32(0))
        table_row = row if plan.table_rows > 1 else w.i32(0)

        def turn_of(place, table_row=table_row):
            return attention.table_row(plan, *tables, table_row, w.imul(place, TOKENS), lane) if tables else []

        # What does not depend on the phase before is read before the meeting.
        biases = []
        if plan.biased:
            size = 4 if plan.key_bias_dtype == "float32" else 2
            bias = w.element(pointers["key_bias"], w.imul(layer, plan.kv_heads * plan.head_dim), size)
            biases = attention.load_bias(plan, bias, head, lane)
        first_turn = turn_of(w.iadd(low, warp))
        if round_ == 0:
            me.reach(meetings)

        def work(
            index=index, row=row, head=head, low=low, high=high, valid=valid, every=every, number=number,
            biases=biases, first_turn=first_turn, turn_of=turn_of,
        ):  # fmt: skip
            # Each part of a list has a warp of its own: queries, and in the last split the newest key and value.
            newest_here, position = w.equal(high, every), w.iadd(valid, -1)
            for which in range(plan.share):
                w.when(
                    w.equal(warp, which % plan.warps),
                    lambda which=which: newest.store_query(
                        pointers, plan, shared, row, head, which, layer, position, lane
                    ),
                )
            for kind in range(2):
                w.when(
                    w.both(newest_here, w.equal(warp, plan.warps - 1 - kind)),
                    lambda kind=kind: newest.store_new(pointers, plan, shared, kind, row, head, layer, position, lane),
                )
            if plan.biased and plan.table_rows > 1:
                attention.store_table(plan, shared["table"], *tables, row, warp, lane)
            me.meet()
            query = attention.query_operand(plan, shared["query"], lane)
            terms = attention.bias_terms(plan, shared["query"], biases, lane) if plan.biased else []
            oldest = w.i32(0) if plan.window is None else w.iadd(valid, -plan.window)
            scratch = w.offset(shared["x"], w.imul(warp, 2 * plan.share * 256))

            def step(index, carried):
                state, turn = carried[: attention.state_size(plan)], carried[attention.state_size(plan) :]
                place = w.iadd(low, index, warp)
                at = w.iadd(number, w.imul(w.idiv(index, plan.warps), plan.cache_slots))
                data, extra, full, empty, parity = me.ring.slot(warp, at)
                following = turn_of(w.iadd(place, plan.warps))
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
                w.when(w.equal(place, w.iadd(every, -1)),
                       lambda: newest.patch(plan, shared, keys, values, scales, mine, lane))  # fmt: skip
                low_row, high_row = w.iadd(oldest, w.imul(first, -1)), w.iadd(valid, w.imul(first, -1))
                state = attention.tile(plan, state, query, keys, values, scales, lane, low_row, high_row, logits)
                d.fence_copies()
                w.warp_barrier()
                for barrier in empties:
                    w.when(w.equal(lane, 0), lambda barrier=barrier: d.barrier_arrive(barrier))
                return [*state, *following]

            mine = w.imax(w.iadd(high, w.imul(low, -1), w.imul(warp, -1)), 0)
            begin = [*attention.start_state(plan), *first_turn]
            state = w.loop(mine, plan.warps, begin, step)[: attention.state_size(plan)]
            attention.merge(plan, state, shared, pointers["partial"], pointers["statistics"], index, warp, lane)

        w.when(exists, work)
        number = w.iadd(number, w.imul(share_of(plan, count, warp), plan.cache_slots))
    return number


def _output(me: Consumer, layer, number, meetings):
    me.reach(meetings)
    width = me.plan.hidden

    def finish(row, column):
        residual = _load_bf16(_source(me, layer), row, width, column)
        return lambda sums: _store_bf16(me.pointers["mid"], row, width, column, w.add(residual, _round(sums[0])))

    return me.multiply(me.plan.matrix("output"), number, me.put_attended, finish, layer)


def _gate_up(me: Consumer, layer, number, meetings):
    scales = me.norm_scales("mlp_norm", layer)
    me.reach(meetings)

    def finish(row, column):
        def store(sums):
            gate, up = _round(sums[0]), _round(sums[1])
            sigmoid = w.reciprocal(w.add(w.f32(1.0), w.exp2(w.mul(gate, w.f32(-1.4426950408889634)))))
            activated = w.mul(_round(w.mul(gate, sigmoid)), up)
            if me.plan.direct:
                place = w.element(me.pointers["act"], matmul.place_of(me.plan, row, column), 2)
                w.store_float_as(place, 0, activated, "bfloat16")
            else:
                _store_bf16(me.pointers["act"], row, me.plan.inner, column, activated)

        return store

    matrix = me.plan.matrix("gate_up")
    return me.multiply(matrix, number, lambda: me.put_normed(me.pointers["mid"], scales), finish)


def _down(me: Consumer, layer, number, meetings):
    me.reach(meetings)
    width = me.plan.hidden

    def finish(row, column):
        residual = _load_bf16(me.pointers["mid"], row, width, column)
        return lambda sums: _store_bf16(me.pointers["hidden"], row, width, column, w.add(residual, _round(sums[0])))

    def put():
        act = me.pointers["act"]
        return act if me.plan.direct else me.put_plain(act, me.plan.inner)

    return me.multiply(me.plan.matrix("down"), number, put, finish, layer)


_PHASES = {"qkv": _qkv, "cache": _cache, "output": _output, "gate_up": _gate_up, "down": _down}

"""The phases of a layer, one after another, and the loop over the layers."""

from pallas_kernels.decode_step import attention, cache, matmul
from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.consumer import Consumer
from pallas_kernels.decode_step.plan import Plan
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


def _output(me: Consumer, layer, number, meetings):
    me.reach(meetings)
    width = me.plan.hidden

    def finish(row, column):
        residual = _load_bf16(_source(me, layer), row, width, column)
        return lambda sums: _store_bf16(me.pointers["mid"], row, width, column, w.add(residual, _round(sums[0])))

    def put():
        return me.pointers["attended"] if "output" in me.plan.unstaged else me.put_attended()

    return me.multiply(me.plan.matrix("output"), number, put, finish, layer)


def _gate_up(me: Consumer, layer, number, meetings):
    scales = me.norm_scales("mlp_norm", layer)
    me.reach(meetings)

    def finish(row, column):
        def store(sums):
            gate, up = _round(sums[0]), _round(sums[1])
            sigmoid = w.reciprocal(w.add(w.f32(1.0), w.exp2(w.mul(gate, w.f32(-1.4426950408889634)))))
            activated = w.mul(_round(w.mul(gate, sigmoid)), up)
            if "down" in me.plan.unstaged:
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
        return act if "down" in me.plan.unstaged else me.put_plain(act, me.plan.inner)

    return me.multiply(me.plan.matrix("down"), number, put, finish, layer)


_PHASES = {"qkv": _qkv, "cache": cache.phase, "output": _output, "gate_up": _gate_up, "down": _down}

"""The newest token's queries, key and value: norm, bias, rotary, rounding to 8 bits; by one warp a head.

A lane holds channels 2l, 2l + 1 and K/2 + 2l, K/2 + 2l + 1: two whole rotary pairs. Every step is rounded to bfloat16
where `qwen_jax.model` rounds it.
"""

from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.plan import Plan
from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.mosaic_gpu_append import round_row


def _rounded(values):
    return [w.unpack(w.pack(x, x, "bf16"), "bf16")[0] for x in values]


def _head(pointers, plan: Plan, row, column, lane):
    """Four channels of a head in the fused projection's result, whose head begins at `column`."""
    base = w.element(pointers["qkv"], w.iadd(w.imul(row, plan.matrix("qkv").out_features), column), 2)
    low, high = (d.load_fresh(base, w.iadd(w.imul(lane, 4), more), 1)[0] for more in (0, plan.head_dim))
    return [*w.unpack(low, "bf16"), *w.unpack(high, "bf16")]


def four(pointer, plan: Plan, start, lane, dtype: str):
    """The same four channels of a vector in global memory."""
    size = 4 if dtype == "float32" else 2
    base = w.element(pointer, start, size)
    return [
        w.load_float_of(base, w.iadd(w.imul(lane, 2 * size), (more + e) * size), dtype)
        for more in (0, plan.head_dim // 2)
        for e in range(2)
    ]


def normed(plan: Plan, x, scale):
    """RMS norm over a head, rounded."""
    total = w.f32(0.0)
    for value in x:
        total = w.fma(value, value, total)
    mean = w.fma(w.float_warp_sum(total), w.f32(1 / plan.head_dim), w.f32(plan.epsilon))
    inverse = d.reciprocal_sqrt(mean)
    return _rounded([w.mul(w.mul(value, inverse), s) for value, s in zip(x, scale, strict=True)])


def turned(pointers, plan: Plan, x, row, position, lane):
    """Rotated by the new position, rounded."""
    table = row if plan.table_rows > 1 else w.i32(0)
    at = w.imul(w.iadd(w.imul(table, plan.length), position), plan.head_dim // 2)
    cos, sin = (w.load_floats(w.element(pointers[name], at, 4), w.imul(lane, 8), 2) for name in ("cos", "sin"))
    low, high = x[:2], x[2:]
    first = [w.sub(w.mul(a, c), w.mul(b, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
    second = [w.add(w.mul(b, c), w.mul(a, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
    return _rounded([*first, *second])


def store_query(pointers, plan: Plan, shared, row, head, which, layer, position, lane):
    """Query `which` of a key/value head into shared memory."""
    x = _head(pointers, plan, row, w.imul(w.iadd(w.imul(head, plan.share), which), plan.head_dim), lane)
    if plan.qk_norm:
        x = normed(plan, x, four(pointers["query_norm"], plan, w.imul(layer, plan.head_dim), lane, plan.norm_dtype))
    x = turned(pointers, plan, x, row, position, lane)
    if plan.logn:
        factor = _rounded(w.load_floats(pointers["logn"], w.imul(position, 4), 1))[0]
        x = [w.mul(value, factor) for value in x]
    target = w.iadd(w.imul(which, 2 * plan.head_dim), w.imul(lane, 4))
    w.store_words(shared["query"], target, [w.pack(x[0], x[1], "bf16")])
    w.store_words(shared["query"], w.iadd(target, plan.head_dim), [w.pack(x[2], x[3], "bf16")])


def store_new(pointers, plan: Plan, shared, kind: int, row, head, layer, position, lane):
    """The newest key (`kind` 0) or value (1): into the cache and, the same bytes, into shared memory's `fresh`."""
    start = w.imul(w.iadd(head, plan.heads + kind * plan.kv_heads), plan.head_dim)
    x = _head(pointers, plan, row, start, lane)
    if kind == 0:
        if plan.qk_norm:
            x = normed(plan, x, four(pointers["key_norm"], plan, w.imul(layer, plan.head_dim), lane, plan.norm_dtype))
        if plan.key_bias_dtype and not plan.quantized:
            at = w.imul(w.iadd(w.imul(layer, plan.kv_heads), head), plan.head_dim)
            bias = _rounded(four(pointers["key_bias"], plan, at, lane, plan.key_bias_dtype))
            x = _rounded([w.add(a, b) for a, b in zip(x, bias, strict=True)])
        x = turned(pointers, plan, x, row, position, lane)
    cached = w.imul(w.iadd(layer, plan.first_layer), plan.batch)
    token = w.iadd(w.imul(w.iadd(w.imul(w.iadd(cached, row), plan.kv_heads), head), plan.length), position)
    fresh = w.offset(shared["fresh"], kind * (2 * plan.head_dim + 16))
    array = pointers[("keys", "values")[kind]]
    if not plan.quantized:
        words = [w.pack(x[0], x[1], "bf16"), w.pack(x[2], x[3], "bf16")]
        for target in (fresh, w.element(array, token, 2 * plan.head_dim)):
            for half, word in enumerate(words):
                w.store_words(target, w.iadd(w.imul(lane, 4), half * plan.head_dim), [word])
        return
    units, scale, minimum = round_row(x)
    for target in (fresh, w.element(array, token, plan.head_dim)):
        for index, unit in enumerate(units):
            w.store_byte(target, w.iadd(w.imul(lane, 2), index // 2 * (plan.head_dim // 2) + index % 2), unit)
    names = ("key_scales", "key_minimums") if kind == 0 else ("value_scales", "value_minimums")

    def facts():
        for index, (name, value) in enumerate(zip(names, (scale, minimum), strict=True)):
            w.store_float_as(fresh, plan.head_dim + 2 * index, value, "float16")
            w.store_float_as(w.element(pointers[name], token, 2), 0, value, "float16")

    w.when(w.equal(lane, 0), facts)


def patch(plan: Plan, shared, keys, values, scales, row, lane):
    """The newest token's bytes from `fresh` into a row of a tile; by the warp that is about to read the tile."""
    size = plan.head_dim * (1 if plan.quantized else 2)
    for kind, target in enumerate((keys, values)):
        fresh = w.offset(shared["fresh"], kind * (2 * plan.head_dim + 16))
        for piece in range(size // 128):
            word = w.load_words(fresh, w.iadd(w.imul(lane, 4), 128 * piece), 1)
            w.store_words(target, w.iadd(w.imul(row, size), w.imul(lane, 4), 128 * piece), word)
        if plan.quantized:
            for index in range(2):
                value = w.load_float_of(fresh, plan.head_dim + 2 * index, "float16")
                where = w.iadd(w.imul(row, 2), (2 * kind + index) * 32)
                w.when(
                    w.equal(lane, 0), lambda where=where, value=value: w.store_float_as(scales, where, value, "float16")
                )
    w.warp_barrier()

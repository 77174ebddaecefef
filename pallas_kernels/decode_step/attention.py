"""Attention of one new token over the cache: warps take 16 tokens at a time, the newest joins in shared memory.

The arithmetic is `kv_attention.mosaic_gpu_tile`'s (see there for 8 bits as float16, scales in exponents) and the keys'
bias `kv_attention.mosaic_gpu_key_bias`'s, laid out for warps on their own and for cache rows without a swizzle. The
contraction's order is free: thread t of a row takes pieces t, 4 + t … of 16 bytes, and odd rows read them in swapped
order, so that eight lanes meet all banks.
"""

import math

from pallas_kernels.decode_step import instructions as d
from pallas_kernels.decode_step.plan import TOKENS, Plan
from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.mosaic_gpu_fragments import bytes_to_halves, raised_bytes, split_halves
from pallas_kernels.kv_attention.mosaic_gpu_tile import HEADROOM, LOWEST, MASKED, TINY

UNIT = 2.0**-6  # of the bias product, as in mosaic_gpu_key_bias


def state_size(plan: Plan) -> int:
    """Floats of a warp's running state a thread: outputs, then maximum, sum and offset, two columns each."""
    return plan.head_dim // 4 + 6


def start_state(plan: Plan):
    """The state before the first token."""
    return [w.f32(0.0)] * (plan.head_dim // 4) + [w.f32(LOWEST)] * 2 + [w.f32(0.0)] * 4


def _half(plan: Plan) -> str:
    return "f16" if plan.quantized else "bf16"


def query_operand(plan: Plan, query, lane):
    """(operand B of the logits' steps, two sums of the queries' elements); query: shared memory bfloat16 [share, K]."""
    g, t = w.idiv(lane, 4), w.irem(lane, 4)
    row = w.imul(w.imin(g, plan.share - 1), plan.head_dim * 2)
    elements = 16 if plan.quantized else 8  # of a piece of 16 bytes of the cache
    fragments = []
    for piece in range(plan.head_dim // (4 * elements)):
        at = w.iadd(row, w.imul(w.iadd(t, 4 * piece), elements * 2))
        for half in range(elements // 8):
            fragments += w.load_words(query, w.iadd(at, 16 * half), 4)
    if plan.quantized:
        fragments = [w.pack(*w.unpack(word, "bf16"), "f16") for word in fragments]
    sums = [w.f32(0.0)] * 4
    for step in range(len(fragments) // 2 if plan.quantized else 0):
        sums = w.mma(sums, [w.i32(0x3C003C00)] * 4, fragments[2 * step : 2 * step + 2], "f16")
    return fragments, sums[:2]


def _key_rows(plan: Plan, keys, lane):
    """Words of rows g and g + 8 of a tile's keys, each row's pieces in order."""
    g, t = w.idiv(lane, 4), w.irem(lane, 4)
    size = plan.head_dim * (1 if plan.quantized else 2)
    odd = w.irem(g, 2)
    swapped = w.equal(odd, 1)
    rows = []
    for high in range(2):
        base = w.iadd(w.imul(g, size), high * 8 * size, w.imul(t, 16))
        pieces = [
            w.load_words(keys, w.iadd(base, w.imul(w.ixor(odd, piece % 2), 64), piece // 2 * 128), 4)
            for piece in range(size // 64)
        ]
        words = []
        for first in range(0, len(pieces), 2):
            for a, b in ((first, first + 1), (first + 1, first)):
                words += [w.select(swapped, y, x) for x, y in zip(pieces[a], pieces[b], strict=True)]
        rows.append(words)
    return rows


def tile(plan: Plan, state, query, keys, values, scales, lane, low, high, extra):
    """The state after 16 more tokens, of which rows low ≤ row < high count.

    Args:
        plan: static facts.
        state: floats of a thread.
        query: from `query_operand`.
        keys: shared memory [16, K], as values.
        values: see keys.
        scales: shared memory float16 [4, 16], or None.
        lane: of the warp.
        low: int32.
        high: int32.
        extra: four logits of the keys' bias in log2 units, or None.
    """
    fragments, sums = query
    g, t = w.idiv(lane, 4), w.irem(lane, 4)
    half, outputs = _half(plan), plan.head_dim // 4
    acc, maximum, total, shift = state[:outputs], state[outputs : outputs + 2], state[-4:-2], state[-2:]
    unit = plan.scale * math.log2(math.e)
    rows = _key_rows(plan, keys, lane)
    parts = [[w.f32(0.0)] * 4, [w.f32(0.0)] * 4]
    for step in range(plan.head_dim // 16):
        if plan.quantized:
            a = [raised_bytes(rows[r][step], which) for which in (0x4140, 0x4342) for r in range(2)]
        else:
            a = [rows[r][2 * step + which] for which in range(2) for r in range(2)]
        parts[step % 2] = w.mma(parts[step % 2], a, fragments[2 * step : 2 * step + 2], half)
    product = [w.add(x, y) for x, y in zip(*parts, strict=True)]
    logits, facts = [None] * 4, []
    for r in range(2):
        row = w.iadd(g, 8 * r)
        seen = w.both(w.less(row, high), w.less(w.iadd(low, -1), row))
        log2_scale = inverse = minimum = None
        if plan.quantized:
            key_scale, key_minimum, value_scale, value_minimum = (
                w.load_float_of(scales, w.iadd(w.imul(row, 2), 2 * TOKENS * which), "float16") for which in range(4)
            )
            step = w.mul(key_scale, w.f32(unit))
            middle = w.mul(w.fma(key_scale, w.f32(-1024.0), key_minimum), w.f32(unit))
            value_scale = w.maximum(value_scale, w.f32(TINY))
            log2_scale, inverse = w.log2(value_scale), w.reciprocal(value_scale)
            minimum = w.select(seen, w.fma(value_scale, w.f32(128.0), value_minimum), w.f32(0.0))
        for column in range(2):
            at = 2 * r + column
            if plan.quantized:
                logit = w.fma(product[at], step, w.mul(middle, sums[column]))
                if extra is not None:
                    logit = w.add(logit, extra[at])
                logit = w.add(logit, log2_scale)
            else:
                logit = w.mul(product[at], w.f32(unit))
            logits[at] = w.select(seen, logit, w.f32(MASKED))
        facts.append((inverse, minimum))
    renewed, weights = [], [None] * 4
    for column in range(2):
        highest = w.maximum(maximum[column], w.maximum(logits[column], logits[2 + column]))
        for distance in (4, 8, 16):
            highest = w.maximum(highest, w.shuffle_xor(highest, distance))
        renewed.append(highest)
    ratio = [w.exp2(w.sub(old, new)) for old, new in zip(maximum, renewed, strict=True)]
    acc = [w.mul(value, ratio[index % 2]) for index, value in enumerate(acc)]
    total = [w.mul(value, ratio[index]) for index, value in enumerate(total)]
    shift = [w.mul(value, ratio[index]) for index, value in enumerate(shift)]
    for column in range(2):
        base = w.sub(renewed[column], w.f32(HEADROOM))
        for r in range(2):
            weight = w.exp2(w.sub(logits[2 * r + column], base))
            weights[2 * r + column] = weight
            if plan.quantized:
                weight = w.mul(weight, facts[r][0])
                shift[column] = w.fma(weight, facts[r][1], shift[column])
            total[column] = w.add(total[column], weight)
    acc = _weigh(plan, acc, weights, values, g, t)
    return [*acc, *renewed, *total, *shift]


def _weigh(plan: Plan, acc, weights, values, g, t):
    """acc + weights · values of 16 tokens."""
    half = _half(plan)
    packed = [w.pack(weights[2 * r], weights[2 * r + 1], half) for r in range(2)]
    b = [w.transpose(word) for word in packed]
    size = plan.head_dim * (1 if plan.quantized else 2)
    rows = []
    for r in range(2):
        for odd in range(2):
            base = w.iadd(w.imul(t, 2 * size), (8 * r + odd) * size, w.imul(g, 16))
            rows.append([word for at in range(0, size, 128) for word in w.load_words(values, w.iadd(base, at), 4)])
    new = []
    for at in range(len(rows[0])):
        columns = [row[at] for row in rows]
        if plan.quantized:
            operands = []
            for selector in (0x5140, 0x7362):
                mixed = [w.permute(columns[2 * r], columns[2 * r + 1], selector) for r in range(2)]
                operands.append([bytes_to_halves(m, which) for m in mixed for which in (0x4140, 0x4342)])
        else:
            operands = [
                [w.permute(columns[2 * r], columns[2 * r + 1], which) for r in range(2) for which in (0x5410, 0x7632)]
            ]
        for operand in operands:
            new += w.mma(acc[len(new) : len(new) + 4], operand, b, half)
    return new


def channel(plan: Plan, position: int, g):
    """The channel of a thread's output row `position`."""
    elements = 16 if plan.quantized else 8
    return w.iadd(w.imul(g, elements), position // elements * 8 * elements + position % elements)


def sums_of_rows(total, shift):
    """Sums over the lanes that hold different rows of a tile."""
    for distance in (4, 8, 16):
        total = [w.add(x, w.shuffle_xor(x, distance)) for x in total]
        shift = [w.add(x, w.shuffle_xor(x, distance)) for x in shift]
    return total, shift


def store_part(plan: Plan, partial, statistics, row, at, value, top, weight):
    """Channel `at` of a part's query."""
    w.store_floats(w.element(partial, w.iadd(w.imul(row, plan.head_dim), at), 4), 0, [value])
    w.when(w.equal(at, 0), lambda: w.store_floats(w.element(statistics, row, 8), 0, [top, weight]))


def merge(plan: Plan, state, shared, partial, statistics, index, warp, lane):
    """All warps' states become part `index` of `partial` [parts, share, K] and `statistics` [parts, share, 2]."""
    K, share, warps, together = plan.head_dim, plan.share, plan.warps, plan.merge_queries
    outputs = K // 4
    acc, maximum, total, shift = state[:outputs], state[outputs : outputs + 2], state[-4:-2], state[-2:]
    g, t = w.idiv(lane, 4), w.irem(lane, 4)
    total, shift = sums_of_rows(total, shift)
    region = shared["sums"]
    facts = w.offset(region, warps * together * K * 4)  # [warp][maximum, sum][8 queries]
    where = w.iadd(w.imul(warp, 64), w.imul(t, 8))
    w.when(w.equal(g, 0), lambda: w.store_floats(facts, where, maximum))
    d.meet(1, 32 * warps)
    highest = maximum
    for other in range(warps):
        theirs = w.load_floats(facts, w.iadd(w.imul(t, 8), 64 * other), 2)
        highest = [w.maximum(x, y) for x, y in zip(highest, theirs, strict=True)]
    factor = [w.exp2(w.sub(x, y)) for x, y in zip(maximum, highest, strict=True)]
    scaled = [w.mul(x, y) for x, y in zip(total, factor, strict=True)]
    w.when(w.equal(g, 0), lambda: w.store_floats(facts, w.iadd(where, 32), scaled))
    thread = w.iadd(w.imul(warp, 32), lane)
    for first in range(0, share, together):
        count = min(together, share - first)
        for c in range(2):
            query = w.iadd(w.imul(t, 2), c - first)

            def write(c=c, query=query):
                base = w.imul(w.iadd(w.imul(warp, together), query), K * 4)
                for position in range(K // 8):
                    value = acc[position // 2 * 4 + position % 2 * 2 + c]
                    place = w.iadd(base, w.imul(channel(plan, position, g), 4))
                    w.store_floats(region, place, [w.mul(w.add(value, shift[c]), factor[c])])

            w.when(w.both(w.less(-1, query), w.less(query, count)), write)
        d.meet(1, 32 * warps)
        for round_ in range(-(-count * K // (32 * warps))):
            element = w.iadd(thread, round_ * 32 * warps)
            exists = w.less(element, count * K)
            element = w.imin(element, count * K - 1)
            query, at = w.idiv(element, K), w.irem(element, K)
            value = weight = w.f32(0.0)
            top = w.f32(LOWEST)
            for other in range(warps):
                value = w.add(value, w.load_floats(region, w.imul(w.iadd(element, other * together * K), 4))[0])
                theirs = w.iadd(w.imul(w.iadd(query, first), 4), 64 * other)
                top = w.maximum(top, w.load_floats(facts, theirs)[0])
                weight = w.add(weight, w.load_floats(facts, w.iadd(theirs, 32))[0])
            row = w.iadd(w.imul(index, share), query, first)

            def store(row=row, at=at, value=value, top=top, weight=weight):
                store_part(plan, partial, statistics, row, at, value, top, weight)

            w.when(exists, store)
        d.meet(1, 32 * warps)


# -- the keys' bias -----------------------------------------------------------------------------------------------


def store_table(plan: Plan, table, cos, sin, slot, warp, lane):
    """Warps 0 … 7 put cos, sin of the first 16 positions into `table`, high parts then low, as operand A has them."""
    pairs = plan.head_dim // 2
    g, t = w.idiv(lane, 4), w.irem(lane, 4)

    def write():
        half, chunk = w.idiv(warp, 4), w.irem(warp, 4)
        start = w.imul(slot, plan.length)
        inverse = w.reciprocal(w.load_floats(w.element(cos, start, 4 * pairs), 0)[0])  # the attention factor
        row = w.iadd(g, w.imul(half, 8))
        where = w.iadd(w.imul(row, 4 * pairs), w.imul(w.iadd(w.imul(chunk, 16), w.imul(t, 4)), 4))
        c, s = (w.load_floats(w.element(ref, start, 4 * pairs), where, 4) for ref in (cos, sin))
        words = [split_halves(w.mul(x, inverse), w.mul(y, inverse)) for x, y in zip(c, s, strict=True)]
        for part in range(2):
            place = w.iadd(w.imul(w.iadd(w.imul(half, 4), chunk), 512), w.imul(lane, 16), part * 4096)
            w.store_words(table, place, [word[part] for word in words])

    w.when(w.less(warp, 8), write)


def load_bias(plan: Plan, bias, head, lane):
    """The keys' bias of the pairs 2l, 2l + 1: (first, second channel) of each."""
    size, pairs = 4 if plan.key_bias_dtype == "float32" else 2, plan.head_dim // 2
    found = []
    for e in range(2):
        where = w.imul(w.iadd(w.imul(head, plan.head_dim), w.imul(lane, 2), e), size)
        found.append([w.load_float_of(bias, w.iadd(where, at * size), plan.key_bias_dtype) for at in (0, pairs)])
    return found


def bias_terms(plan: Plan, query, biases, lane):
    """(q₁b₁ + q₂b₂, q₂b₁ − q₁b₂) of the pairs 2l, 2l + 1 of each query, in log2 units times `UNIT`."""
    unit, found = plan.scale * math.log2(math.e) * UNIT, []
    for which in range(plan.share):
        base = w.iadd(w.imul(lane, 4), which * plan.head_dim * 2)
        first, second = (w.unpack(w.load_words(query, w.iadd(base, at), 1)[0], "bf16") for at in (0, plan.head_dim))
        for e, (b1, b2) in enumerate(biases):
            q1, q2 = first[e], second[e]
            found.append(w.mul(w.fma(q1, b1, w.mul(q2, b2)), w.f32(unit)))
            found.append(w.mul(w.sub(w.mul(q2, b1), w.mul(q1, b2)), w.f32(unit)))
    return found


def table_row(plan: Plan, cos, sin, slot, position, lane):
    """cos of the pairs 2l, 2l + 1 of a position, then sin."""
    row = w.iadd(w.imul(slot, plan.length), w.imin(position, plan.length - 1))
    return [x for ref in (cos, sin) for x in w.load_floats(w.element(ref, row, 2 * plan.head_dim), w.imul(lane, 8), 2)]


def bias_logits(plan: Plan, terms, turn, scratch, table, lane):
    """The four bias logits (log2 units) of a thread for 16 tokens: high · high + high · low + low · high.

    Args:
        plan: static facts.
        terms: from `bias_terms`.
        turn: from `table_row`, of the first token's position.
        scratch: the warp's own shared memory, [2, share, K/2] words.
        table: from `store_table`.
        lane: of the warp.
    """
    share, chunks, parts = plan.share, plan.head_dim // 32, plan.parts_of_bias
    g, t = w.idiv(lane, 4), w.irem(lane, 4)
    for query in range(share):
        words = [[], []]
        for e in range(2):
            with_cos, with_sin = terms[4 * query + 2 * e : 4 * query + 2 * e + 2]
            c, s = turn[e], turn[2 + e]
            new_cos = w.fma(with_cos, c, w.mul(with_sin, s))
            new_sin = w.sub(w.mul(with_sin, c), w.mul(with_cos, s))
            for part, word in zip(words, split_halves(new_cos, new_sin), strict=True):
                part.append(word)
        for part in range(2):
            w.store_words(scratch, w.iadd(w.imul(lane, 8), (part * share + query) * 256), words[part])
    w.warp_barrier()
    if parts == 1:  # columns 4 … 7 hold the low parts
        query = w.iadd(w.imin(w.irem(g, 4), share - 1), w.imul(w.idiv(g, 4), share))
    else:
        query = w.imin(g, share - 1)
    mine = w.iadd(w.imul(query, 256), w.imul(t, 16))
    acc = [[w.f32(0.0)] * 4 for _ in range(3)]
    for chunk in range(chunks):
        b = [w.load_words(scratch, w.iadd(mine, part * share * 256 + chunk * 64), 4) for part in range(parts)]
        left = [
            [
                w.load_words(table, w.iadd(w.imul(lane, 16), part * 4096 + (half * 4 + chunk) * 512), 4)
                for half in range(2)
            ]
            for part in range(2)
        ]
        for step in range(2):
            right = [words[2 * step : 2 * step + 2] for words in b]
            for index, (i, j) in enumerate(((0, 0), (1, 0)) if parts == 1 else ((0, 0), (1, 0), (0, 1))):
                a = [left[i][half][2 * step + e] for e in range(2) for half in range(2)]
                acc[index] = w.mma(acc[index], a, right[j], "f16")
    logits = [w.add(x, w.add(y, z)) for x, y, z in zip(*acc, strict=True)]
    if parts == 1:
        logits = [w.add(x, w.shuffle_xor(x, 2)) for x in logits]
    w.warp_barrier()  # the scratch may be written again
    return [w.mul(x, w.f32(1 / UNIT)) for x in logits]

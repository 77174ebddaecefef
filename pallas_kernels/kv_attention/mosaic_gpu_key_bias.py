"""The key bias of an 8-bit cache, added back exactly: q · R_p b for every position p, on tensor cores.

With W = Σᵢ (q₁b₁ + q₂b₂, q₂b₁ − q₁b₂) turned back by a tile's first position p₀, the bias logit of p₀ + j is W's
product with the cos and sin of j alone. A warp keeps the 16 rows of that table which are its tokens' in registers; W is
turned once a tile, by all four warps. Both sides are split in two float16 parts (22 bits), for a bias of norm 900 in
float16 alone would leave an error of 0.1 in the logits.
"""

import math

from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.mosaic_gpu_fragments import WARPGROUP, Thread, TileShape, split_halves

UNIT = 2.0**-6  # of the product: float16 then spans 2e-6 … 4e6 of a logit


def parts_of(shape: TileShape) -> int:
    """1 if W's low parts fit in the columns 4 … 7 beside the high ones: one operand then serves both; else 2."""
    return 1 if shape.share <= 4 else 2


def table(shape: TileShape, cos, sin, slot, length: int):
    """Words of cos and sin of the warp's 16 of the first tile's positions, high parts then low, as mma's A operand."""
    thread = Thread.here()
    pairs = shape.head_dim // 2
    cos, sin = (w.element(ref, w.imul(slot, length), 4 * pairs) for ref in (cos, sin))
    inverse = w.reciprocal(w.load_floats(cos, 0)[0])  # cos 0 times the attention factor
    parts = [[], []]
    for half in range(2):
        row = w.imin(w.iadd(w.imul(thread.warp, 16), thread.g, 8 * half), length - 1)
        for chunk in range(shape.head_dim // 32):
            pair = w.iadd(w.imul(thread.t, 4), 16 * chunk)
            where = w.imul(w.iadd(w.imul(row, pairs), pair), 4)
            for c, s in zip(w.load_floats(cos, where, 4), w.load_floats(sin, where, 4), strict=True):
                for part, word in zip(parts, split_halves(w.mul(c, inverse), w.mul(s, inverse)), strict=True):
                    part.append(word)
    return [*parts[0], *parts[1]]


def terms(shape: TileShape, thread, query, bias_GK, terms_smem, head):
    """Stores (q₁b₁ + q₂b₂, q₂b₁ − q₁b₂) of every pair, in log2 units."""
    K, pairs = shape.head_dim, shape.head_dim // 2
    unit = shape.scale * math.log2(math.e) * UNIT
    width = 4 if shape.bias_dtype == "float32" else 2
    for piece in range(-(-shape.share * pairs // WARPGROUP)):
        index = w.imin(w.iadd(thread.index, piece * WARPGROUP), shape.share * pairs - 1)
        row, pair = w.idiv(index, pairs), w.irem(index, pairs)
        at = w.iadd(w.imul(row, K), pair)
        q1, q2 = (w.load_float_of(query, w.imul(w.iadd(at, e), 2), shape.dtype) for e in (0, pairs))
        at = w.iadd(w.imul(head, K), pair)
        b1, b2 = (w.load_float_of(bias_GK, w.imul(w.iadd(at, e), width), shape.bias_dtype) for e in (0, pairs))
        with_cos = w.mul(w.fma(q1, b1, w.mul(q2, b2)), w.f32(unit))
        with_sin = w.mul(w.sub(w.mul(q2, b1), w.mul(q1, b2)), w.f32(unit))
        w.store_floats(terms_smem, w.imul(index, 8), [with_cos, with_sin])


def turn(shape: TileShape, thread, bias):
    """Turns the bias terms to the tile's first row and lays them out as mma's B operand, in two float16 parts.

    Each thread takes some (query, pair); the warps meet, for each reads what all have written.
    """
    _, cos, sin, terms_smem, scratch = bias
    pairs, chunks = shape.head_dim // 2, shape.head_dim // 32
    low_part = 4 * 64 if parts_of(shape) == 1 else chunks * 512
    for piece in range(-(-shape.share * pairs // WARPGROUP)):
        index = w.imin(w.iadd(thread.index, piece * WARPGROUP), shape.share * pairs - 1)
        query, pair = w.idiv(index, pairs), w.irem(index, pairs)
        c, s = (w.load_floats(ref, w.imul(pair, 4))[0] for ref in (cos, sin))
        with_cos, with_sin = w.load_floats(terms_smem, w.imul(index, 8), 2)
        new_cos = w.fma(with_cos, c, w.mul(with_sin, s))
        new_sin = w.sub(w.mul(with_sin, c), w.mul(with_cos, s))
        place = w.iadd(w.imul(w.idiv(pair, 16), 512), w.imul(w.idiv(w.irem(pair, 16), 4), 16))
        place = w.iadd(place, w.imul(w.irem(pair, 4), 4), w.imul(query, 64))
        for part, word in enumerate(split_halves(new_cos, new_sin)):
            w.store_words(scratch, w.iadd(place, part * low_part), [word])
    w.warpgroup_barrier()


def product(shape: TileShape, thread, bias):
    """The bias logits of 16 tokens, in UNIT: high·high + high·low + low·high."""
    fragments, scratch, parts = bias[0], bias[-1], parts_of(shape)
    chunks = shape.head_dim // 32
    query = w.irem(thread.g, 4) if parts == 1 else thread.g
    query = w.imin(query, shape.share - 1)
    if parts == 1:
        query = w.iadd(query, w.imul(w.idiv(thread.g, 4), 4))
    mine = w.imul(w.iadd(w.imul(query, 4), thread.t), 16)
    acc = [[w.f32(0.0)] * 4 for _ in range(3)]
    for chunk in range(chunks):
        b = [w.load_words(scratch, w.iadd(mine, (part * chunks + chunk) * 512), 4) for part in range(parts)]
        for step in range(2):
            left = [
                [
                    fragments[((part * 2 + half) * chunks + chunk) * 4 + 2 * step + e]
                    for e in range(2)
                    for half in range(2)
                ]
                for part in range(2)
            ]
            right = [words[2 * step : 2 * step + 2] for words in b]
            pairs = ((0, 0), (1, 0)) if parts == 1 else ((0, 0), (1, 0), (0, 1))
            for index, (i, j) in enumerate(pairs):
                acc[index] = w.mma(acc[index], left[i], right[j], "f16")
    total = [w.add(x, w.add(y, z)) for x, y, z in zip(*acc, strict=True)]
    return [w.add(x, w.shuffle_xor(x, 2)) for x in total] if parts == 1 else total

"""The arithmetic of decode attention on one warpgroup, by warp-level tensor-core instructions (mma.sync m16n8k16).

A tile is 64·R tokens of one slot and key/value head; each of the four warps takes 16·R of them and keeps a softmax of
its own, merged when a segment ends. Bytes of the cache go from shared memory into registers in mma's own order.

8 bits become halves exactly: byte u under 0x64 is the float16 1024 + u. With s, m a token's scale and minimum,
logit = s·(q·(1024 + u)) + (m − 1024 s)·Σq, whose float32 rounding is some 1e-4 of a logit; values, summed over many
tokens, take u − 128 instead. The value's scale goes into the exponent, weight = 2^(logit + log2 s − M) with M the
running maximum of that sum, so that weights lie in (0, 2^14] and fit float16 whatever s is. The key bias has a module
of its own.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.kv_attention import mosaic_gpu_key_bias as key_bias
from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.mosaic_gpu_fragments import (
    Thread,
    TileShape,
    bag,
    bag_layout,
    bytes_to_halves,
    cache_transforms,
    key_pieces,
    raised_bytes,
    read_row,
    rebag,
    scalar,
    unbag,
    value_pieces,
)

LOWEST = -1e30  # start of the running maximum: finite, so that no difference of two is NaN
MASKED = float("-inf")
HEADROOM = 14.0  # weights are at most 2^14: small ones stay clear of float16's subnormal range
TINY = 2.0**-24  # float16's smallest; stands in for a value scale of zero, whose logarithm would be infinite


class FastTile:
    """The arithmetic as inline code. `tests` hold a portable twin with the same methods for the interpreter."""

    def __init__(self, shape: TileShape):
        self.shape = shape
        self.half = "f16" if shape.quantized or shape.dtype == "float16" else "bf16"

    @staticmethod
    def natural(maximum):
        """The natural logarithm that the weights refer to which `state` sums up under this maximum, for arrays."""
        return (maximum - HEADROOM) * math.log(2)

    # -- a segment starts ---------------------------------------------------------------------------------------

    def table(self, cos, sin, slot):
        """The bias product's table as mma's A operand: cos and sin of the warp's rows of the first tile, in registers.

        Args:
            cos: global memory float32 [slots, S, K/2], as sin.
            sin: see cos.
            slot: int32 scalar.
        """
        shape = self.shape
        length = cos.shape[1]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),) * 2 + (plgpu.Layout.WG_SPLAT,), return_type=bag(shape.table, jnp.int32)
        )
        def emit(ctx, cos, sin, slot):
            del ctx
            words = key_bias.table(shape, utils.memref_ptr(cos), utils.memref_ptr(sin), scalar(slot), length)
            return rebag(words, w.i32_type())

        return emit(cos, sin, slot)

    def start(self, query, bias=None):
        """Reads a segment's queries: (setup, state) of `tile`.

        Args:
            query: shared memory [share, K].
            bias: with a key bias (bias_GK in global memory, head, terms: shared memory float32 [share, K/2, 2] that
                receives the product's terms); else None.
        """
        shape = self.shape
        ref, number = plgpu.RefType(), plgpu.Layout.WG_SPLAT
        types = (ref,) if bias is None else (ref, ref, number, ref)
        returns = [bag(shape.setup, jnp.int32), bag(shape.state, jnp.float32)]

        @plgpu.inline_mgpu(arg_types=types, return_type=returns)
        def emit(ctx, query, *bias):
            del ctx
            if bias:
                bias_GK, head, terms = bias
                bias = (utils.memref_ptr(bias_GK), utils.memref_ptr(terms), scalar(head))
            words, state = self._start(utils.memref_ptr(query), bias)
            return [rebag(words, w.i32_type()), rebag(state, w.f32_type())]

        return tuple(emit(query, *(bias or ())))

    def _start(self, query, bias):
        shape = self.shape
        thread = Thread.here()
        fragments = self._query_fragments(thread, query)
        if bias:
            key_bias.terms(shape, thread, query, *bias)
            w.warpgroup_barrier()
        ones = [w.i32(0x3C003C00)] * 4
        sums = [w.f32(0.0)] * 4
        if shape.quantized:
            for step in range(shape.head_dim // 16):
                sums = w.mma(sums, ones, fragments[2 * step : 2 * step + 2], self.half)
        words = [*fragments, *(w.as_word(x) for x in sums[:2])]
        state = [w.f32(0.0)] * (shape.head_dim // 4) + [w.f32(LOWEST)] * 2 + [w.f32(0.0)] * 4
        return words, state

    def _query_fragments(self, thread, query):
        """Words of mma's B operand; columns past `share` repeat the last query and are never used."""
        shape = self.shape
        size = shape.head_dim * 2
        row = w.imul(w.imin(thread.g, shape.share - 1), size)
        words = []
        for at, count, extra in key_pieces(shape, thread):
            # A piece of the cache's row covers `count` words; the query's elements have twice an 8-bit cache's size.
            ratio = 2 // shape.itemsize
            for half in range(ratio):
                where = w.iadd(row, w.imul(extra, ratio), at * ratio + half * count * 4)
                words += w.load_words(query, where, count)
        if self.half == "f16" and shape.dtype == "bfloat16":
            words = [w.pack(*w.unpack(word, "bf16"), "f16") for word in words]
        return words

    # -- a tile -------------------------------------------------------------------------------------------------

    def tile(self, setup, state, keys, values, scales, low, high, bias=None):
        """Attends to the tokens low ≤ row < high of a tile; returns the new state.

        Args:
            setup: from `start`.
            state: from `start` or `tile`.
            keys: shared memory [tokens, K], as values.
            values: see keys.
            scales: shared memory float16 [tokens] of key scales, key minimums, value scales, value minimums; or ().
            low: int32 scalar.
            high: int32 scalar.
            bias: (table; cos, sin of the tile's first position: shared memory [K/2]; terms; scratch), or None.
        """
        shape = self.shape
        cache = plgpu.RefType(cache_transforms(shape))
        types = (bag_layout(shape.setup), bag_layout(shape.state), cache, cache)
        types += (plgpu.Layout.WG_SPLAT,) * 2 + (plgpu.RefType(),) * len(scales)
        if bias:
            types += (bag_layout(shape.table),) + (plgpu.RefType(),) * 4

        @plgpu.inline_mgpu(arg_types=types, return_type=bag(shape.state, jnp.float32))
        def emit(ctx, setup, state, keys, values, low, high, *refs):
            del ctx
            bias = refs[len(scales) :]
            new = self._tile(
                unbag(setup),
                unbag(state),
                utils.memref_ptr(keys),
                utils.memref_ptr(values),
                [utils.memref_ptr(ref) for ref in refs[: len(scales)]],
                (scalar(low), scalar(high)),
                [unbag(bias[0]), *(utils.memref_ptr(ref) for ref in bias[1:])] if bias else (),
            )
            return rebag(new, w.f32_type())

        return emit(setup, state, keys, values, low, high, *scales, *(bias or ()))

    def _tile(self, setup, state, keys, values, scales, bounds, bias):
        shape = self.shape
        thread = Thread.here()
        steps, outputs = shape.head_dim // 16, shape.head_dim // 4
        fragments, sums = setup[: 2 * steps], [w.as_float(x) for x in setup[2 * steps :]]
        acc, maximum, total, shift = state[:outputs], state[outputs : outputs + 2], state[-4:-2], state[-2:]
        first_row = w.imul(thread.warp, 16 * shape.blocks)
        unit = shape.scale * math.log2(math.e)
        if bias:
            key_bias.turn(shape, thread, bias)

        logits, rows = [], []
        for block in range(shape.blocks):
            logit, row = self._logits(thread, fragments, sums, keys, scales, first_row, block, unit, bounds)
            if bias:
                extra = key_bias.product(shape, thread, bias)
                logit = [w.fma(x, w.f32(1 / key_bias.UNIT), y) for x, y in zip(extra, logit, strict=True)]
            for half in range(2):
                for column in range(2):
                    at = 2 * half + column
                    shifted = w.add(logit[at], row[half].log2_scale) if shape.quantized else logit[at]
                    logit[at] = w.select(row[half].seen, shifted, w.f32(MASKED))
            logits.append(logit)
            rows.append(row)

        renewed, weights = [], [[None] * 4 for _ in range(shape.blocks)]
        for column in range(2):
            highest = maximum[column]
            for logit in logits:
                highest = w.maximum(highest, w.maximum(logit[column], logit[2 + column]))
            for distance in (4, 8, 16):
                highest = w.maximum(highest, w.shuffle_xor(highest, distance))
            renewed.append(highest)
        acc, total, shift = _decayed(acc, total, shift, maximum, renewed)
        for column in range(2):
            base = w.sub(renewed[column], w.f32(HEADROOM))
            for block in range(shape.blocks):
                for half in range(2):
                    weight = w.exp2(w.sub(logits[block][2 * half + column], base))
                    weights[block][2 * half + column] = weight
                    row = rows[block][half]
                    if shape.quantized:
                        weight = w.mul(weight, row.inverse_scale)
                        shift[column] = w.fma(weight, row.minimum, shift[column])
                    total[column] = w.add(total[column], weight)
        for block in range(shape.blocks):
            acc = self._weigh(thread, acc, weights[block], values, first_row, block)
        return [*acc, *renewed, *total, *shift]

    def _logits(self, thread, fragments, sums, keys, scales, first_row, block, unit, bounds):
        """The four logits of a thread in a block (log2 units; rows g and g + 8), and what it knows of the two rows."""
        shape = self.shape
        pieces = key_pieces(shape, thread)
        words = [read_row(shape, keys, thread.g, w.iadd(first_row, 16 * block + 8 * half), pieces) for half in range(2)]
        # Two chains of products, so that one's latency hides behind the other.
        acc = [[w.f32(0.0)] * 4, [w.f32(0.0)] * 4]
        for step in range(shape.head_dim // 16):
            if shape.quantized:
                a = [raised_bytes(words[half][step], pick) for pick in (0x4140, 0x4342) for half in range(2)]
            else:
                a = [words[half][2 * step + pick] for pick in range(2) for half in range(2)]
            acc[step % 2] = w.mma(acc[step % 2], a, fragments[2 * step : 2 * step + 2], self.half)
        product = [w.add(x, y) for x, y in zip(*acc, strict=True)]
        rows = []
        logits = [None] * 4
        for half in range(2):
            row = w.iadd(first_row, thread.g, 16 * block + 8 * half)
            seen = w.both(w.less(row, bounds[1]), w.less(w.iadd(bounds[0], -1), row))
            if not shape.quantized:
                rows.append(_Row(seen))
                for column in range(2):
                    logits[2 * half + column] = w.mul(product[2 * half + column], w.f32(unit))
                continue
            key_scale, key_minimum, value_scale, value_minimum = (
                w.load_float_of(ref, w.imul(row, 2), "float16") for ref in scales
            )
            step = w.mul(key_scale, w.f32(unit))
            middle = w.mul(w.fma(key_scale, w.f32(-1024.0), key_minimum), w.f32(unit))
            for column in range(2):
                at = 2 * half + column
                logits[at] = w.fma(product[at], step, w.mul(middle, sums[column]))
            value_scale = w.maximum(value_scale, w.f32(TINY))
            minimum = w.select(seen, w.fma(value_scale, w.f32(128.0), value_minimum), w.f32(0.0))
            rows.append(_Row(seen, w.log2(value_scale), w.reciprocal(value_scale), minimum))
        return logits, rows

    def _weigh(self, thread, acc, weights, values, first_row, block):
        """acc + weights · values of a block's 16 tokens."""
        shape = self.shape
        packed = [w.pack(weights[2 * half], weights[2 * half + 1], self.half) for half in range(2)]
        b = [w.transpose(word) for word in packed]
        pieces = value_pieces(shape, thread)
        words = [
            read_row(shape, values, w.iadd(w.imul(thread.t, 2), odd), w.iadd(first_row, 16 * block + 8 * half), pieces)
            for half in range(2)
            for odd in range(2)
        ]
        new = []
        for at in range(len(words[0])):
            columns = [row[at] for row in words]
            if shape.quantized:
                operands = []
                for selector in (0x5140, 0x7362):
                    mixed = [w.permute(columns[2 * half], columns[2 * half + 1], selector) for half in range(2)]
                    operands.append([bytes_to_halves(m, pick) for m in mixed for pick in (0x4140, 0x4342)])
            else:
                operands = [
                    [
                        w.permute(columns[2 * half], columns[2 * half + 1], selector)
                        for half in range(2)
                        for selector in (0x5410, 0x7632)
                    ]
                ]
            for operand in operands:
                new += w.mma(acc[len(new) : len(new) + 4], operand, b, self.half)
        return new


@dataclasses.dataclass(frozen=True)
class _Row:
    """What a thread knows of one token: whether it counts; of its 8-bit value log2 and inverse of the scale, middle."""

    seen: ir.Value
    log2_scale: ir.Value | None = None
    inverse_scale: ir.Value | None = None
    minimum: ir.Value | None = None


def _decayed(acc, total, shift, maximum, renewed):
    """What was summed under the old maximum, under the new one; skipped where no query of the warp has a new one."""
    grown = w.either(*(w.float_less(old, new) for old, new in zip(maximum, renewed, strict=True)))
    values = [*acc, *total, *shift]

    def decay():
        ratio = [w.exp2(w.sub(old, new)) for old, new in zip(maximum, renewed, strict=True)]
        return [w.mul(value, ratio[index % 2]) for index, value in enumerate(values)]

    new = w.branch(w.any_lane(grown), decay, lambda: values, len(values))
    return new[: len(acc)], new[-4:-2], new[-2:]

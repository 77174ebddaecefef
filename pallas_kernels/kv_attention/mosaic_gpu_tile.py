"""The arithmetic of decode attention on one warpgroup, by warp-level tensor-core instructions (mma.sync m16n8k16).

A tile is 64·R tokens of one slot and key/value head; each of the four warps takes 16·R of them and keeps a softmax of
its own, merged when a segment ends. Tokens (for logits) or channels (for the output) lie on mma's 16 rows, the queries
that share the head on its 8 columns, so that bytes of the cache go from shared memory straight into registers in the
order mma wants and are never moved between threads. The order of a contraction is free: each thread reads whole
16-byte pieces of a row, and the queries are laid out to match.

8 bits become halves exactly: byte u under 0x64 is the float16 1024 + u, minus 1152 is u − 128. With s, m a token's scale
and minimum, logit = s·(q·(u − 128)) + (m + 128 s)·Σq. The value's scale goes into the exponent, weight = 2^(logit +
log2 s − M) with M the running maximum of that sum, so that weights lie in (0, 2^14] and fit float16 whatever s is.

The key bias is added by angle addition. With W = Σᵢ (q₁b₁ + q₂b₂, q₂b₁ − q₁b₂) turned back by the tile's first position,
its logit at row j is a product with cos and sin of j alone: a small table in shared memory, split like W in two
float16 parts (22 bits), serves all tiles.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels.kv_attention import warp as w

WARPGROUP = 128
LOWEST = -1e30  # start of the running maximum: finite, so that no difference of two is NaN
MASKED = float("-inf")
HEADROOM = 14.0  # weights are at most 2^14: small ones stay clear of float16's subnormal range
BIAS_UNIT = 2.0**-6  # the bias product is computed in this unit: float16 then spans 2e-6 … 4e6 of a logit
TINY = 2.0**-24  # float16's smallest; stands in for a value scale of zero, whose logarithm would be infinite


@dataclasses.dataclass(frozen=True)
class TileShape:
    """Static facts of a kernel's arithmetic.

    Attributes:
        head_dim: K, a multiple of 32.
        share: query heads a key/value head, 1 to 8.
        blocks: R, 16-token blocks a warp.
        quantized: 8-bit cache.
        dtype: of the queries, and of a 16-bit cache: "bfloat16" or "float16".
        scale: factor on the logits.
        bias_dtype: dtype of the key bias; None without one.
    """

    head_dim: int
    share: int
    blocks: int
    quantized: bool
    dtype: str
    scale: float
    bias_dtype: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens a tile."""
        return 64 * self.blocks

    @property
    def state(self) -> int:
        """Floats of running state a thread: outputs, then maximum, sum and offset, two columns each."""
        return self.head_dim // 4 + 6

    @property
    def setup(self) -> int:
        """Words a thread keeps of a segment's queries: fragments, two sums, rotations of the warp's first row."""
        return self.head_dim // 8 + 2 + 2 * self.pairs_a_lane

    @property
    def pairs_a_lane(self) -> int:
        """Rotary pairs each lane turns."""
        return math.ceil(self.head_dim / 64) if self.bias_dtype else 0

    @property
    def scratch(self) -> int:
        """Floats of shared memory for merging warps and for the bias product."""
        merging = 4 * 3 * 8 + 4 * self.share * self.head_dim
        turned = 4 * 2 * (self.head_dim // 32) * 32 * 4  # per warp: high and low, chunks of 16 pairs, 32 lanes, 4 words
        return max(merging, turned if self.bias_dtype else 0)

    @property
    def table(self) -> int:
        """Words of the bias product's table."""
        return 2 * 16 * self.blocks * self.head_dim // 2 if self.bias_dtype else 0

    @property
    def itemsize(self) -> int:
        """Bytes an element of the cache."""
        return 1 if self.quantized else 2


def swizzled(shape: TileShape) -> bool:
    """Whether rows are whole 128-byte segments, kept in shared memory with TMA's 128-byte swizzle."""
    return shape.head_dim * shape.itemsize % 128 == 0


def cache_transforms(shape: TileShape):
    """Transforms of the shared-memory buffers of keys and values."""
    if not swizzled(shape):
        return ()
    return plgpu.TilingTransform((8, 128 // shape.itemsize)), plgpu.SwizzleTransform(128)


def _bag(words: int, dtype):
    """A shape and layout under which each thread holds `words` registers of its own."""
    return plgpu.ShapeDtypeStruct((WARPGROUP * words,), dtype, layout=_bag_layout(words))


def _bag_layout(words: int):
    return plgpu.Layout.WG_STRIDED((WARPGROUP * words,), 1)


def _unbag(array):
    return [w.llvm.extractelement(register, w.i32(0)) for register in array.registers.flat]


def _rebag(values, kind):
    vector = w.llvm.mlir_undef(ir.VectorType.get((1,), kind))
    registers = np.empty((len(values),), dtype=object)
    for index, value in enumerate(values):
        registers[index] = w.llvm.insertelement(vector, value, position=w.i32(0))
    layout = mgpu.WGStridedFragLayout((WARPGROUP * len(values),), 1)
    signed = False if kind == w.i32_type() else None
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def _scalar(array):
    return array.registers.item()


@dataclasses.dataclass(frozen=True)
class _Thread:
    """Where a thread stands: its warp, and its row g and column t of mma's fragments."""

    index: ir.Value
    warp: ir.Value
    g: ir.Value
    t: ir.Value
    lane: ir.Value

    @classmethod
    def here(cls):
        index = w.thread_index()
        lane = w.irem(index, 32)
        return cls(index, w.idiv(index, 32), w.idiv(lane, 4), w.irem(lane, 4), lane)


def _piece(size: int) -> int:
    """The widest access, in bytes, that divides `size`: 16, 8 or 4."""
    return next(width for width in (16, 8, 4) if size % width == 0)


def _key_pieces(shape: TileShape, thread: _Thread):
    """The pieces of a key's row a thread reads: (byte offset in an unswizzled row, words, extra byte offset value).

    Together the four threads t of a row read it once; a thread's elements in this order are four a mma step.
    """
    size = shape.head_dim * shape.itemsize
    if swizzled(shape):
        return [
            (segment * 128, 4, w.imul(w.iadd(w.imul(thread.t, 2), odd), 16))
            for segment in range(size // 128)
            for odd in range(2)
        ]
    piece = _piece(size // 4)
    return [(at, piece // 4, w.imul(thread.t, size // 4)) for at in range(0, size // 4, piece)]


def _value_pieces(shape: TileShape, thread: _Thread):
    """Likewise the pieces of a value's row that the threads of row g read."""
    size = shape.head_dim * shape.itemsize
    if swizzled(shape):
        return [(segment * 128, 4, w.imul(thread.g, 16)) for segment in range(size // 128)]
    piece = _piece(size // 8)
    return [(at, piece // 4, w.imul(thread.g, size // 8)) for at in range(0, size // 8, piece)]


def channel_of_output(shape: TileShape, position: int, thread: _Thread):
    """The channel of a thread's output row `position`: the order in which `_value_pieces` reads."""
    elements = 16 // shape.itemsize
    if swizzled(shape):
        return w.iadd(w.imul(thread.g, elements), position // elements * 8 * elements + position % elements)
    return w.iadd(w.imul(thread.g, shape.head_dim // 8), position)


def _read_row(shape: TileShape, base, row_low, row_high: int, pieces):
    """Words of a row: `row_low` (0–7, a value) + `row_high` (a multiple of 8, as value or int) picks the row."""
    size = shape.head_dim * shape.itemsize
    words = []
    for at, count, extra in pieces:
        if swizzled(shape):  # eight rows of a 128-byte segment are one kilobyte, pieces permuted by the row
            high = w.imul(row_high, size)
            within = w.ixor(extra, w.imul(row_low, 16))
            where = w.iadd(high, w.imul(row_low, 128), within, at * 8)
        else:
            where = w.iadd(w.imul(w.iadd(row_low, row_high), size), extra, at)
        words += w.load_words(base, where, count)
    return words


def _bytes_to_halves(word, selector: int):
    """Two bytes of a word, picked by the selector, as float16 u − 128."""
    return w.subtract_f16x2(w.permute(word, w.i32(0x64646464), selector), w.i32(0x64806480))


class FastTile:
    """The arithmetic as inline code. `tests` hold a portable twin with the same methods for the interpreter."""

    def __init__(self, shape: TileShape):
        self.shape = shape
        self.half = "f16" if shape.quantized or shape.dtype == "float16" else "bf16"

    # -- a segment starts ---------------------------------------------------------------------------------------

    def build_table(self, cos, sin, slot, table):
        """Fills the bias product's table from the first rows of cos and sin [slots, S, K/2]."""
        shape = self.shape
        length = cos.shape[1]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3 + (plgpu.Layout.WG_SPLAT,))
        def emit(ctx, cos, sin, table, slot):
            del ctx
            thread = _Thread.here()
            cos, sin, table = (utils.memref_ptr(ref) for ref in (cos, sin, table))
            pairs, chunks = shape.head_dim // 2, shape.head_dim // 32
            start = w.imul(_scalar(slot), length * pairs * 4)
            inverse = w.reciprocal(w.load_floats(cos, start)[0])  # cos 0 times the attention factor
            for piece in range(-(-2 * shape.blocks * chunks // 4)):
                part = w.imin(w.iadd(thread.warp, piece * 4), 2 * shape.blocks * chunks - 1)
                eight, chunk = w.idiv(part, chunks), w.irem(part, chunks)
                row = w.imin(w.iadd(w.imul(eight, 8), thread.g), length - 1)
                pair = w.iadd(w.imul(chunk, 16), w.imul(thread.t, 4))
                where = w.iadd(start, w.imul(w.iadd(w.imul(row, pairs), pair), 4))
                high, low = [], []
                for c, s in zip(w.load_floats(cos, where, 4), w.load_floats(sin, where, 4), strict=True):
                    words = _split(w.mul(c, inverse), w.mul(s, inverse))
                    high.append(words[0])
                    low.append(words[1])
                target = w.iadd(w.imul(part, 2 * 32 * 16), w.imul(thread.lane, 16))
                w.store_words(table, target, high)
                w.store_words(table, w.iadd(target, 32 * 16), low)

        emit(cos, sin, table, slot)

    def start(self, query, bias=None):
        """Reads a segment's queries: (setup, state) of `tile`.

        Args:
            query: shared memory [share, K].
            bias: with a key bias (bias_GK in global memory, head, cos, sin in global memory, table slot, turned: shared
                memory float32 [share, K] that receives the product's terms); else None.
        """
        shape = self.shape
        refs = (plgpu.RefType(),)
        scalar = (plgpu.Layout.WG_SPLAT,)
        types = refs if bias is None else refs + refs + scalar + refs * 2 + scalar + refs
        returns = [_bag(shape.setup, jnp.int32), _bag(shape.state, jnp.float32)]

        @plgpu.inline_mgpu(arg_types=types, return_type=returns)
        def emit(ctx, query, *bias):
            del ctx
            thread = _Thread.here()
            query = utils.memref_ptr(query)
            fragments = self._query_fragments(thread, query)
            if bias:
                bias_GK, head, cos, sin, slot, turned = bias
                pointers = [utils.memref_ptr(ref) for ref in (bias_GK, cos, sin, turned)]
                length = ir.MemRefType(cos.type).shape[1]
                rotation = self._bias_terms(thread, query, pointers, _scalar(head), _scalar(slot), length)
                utils.warpgroup_barrier()
            else:
                rotation = []
            ones = [w.i32(0x3C003C00)] * 4
            sums = [w.f32(0.0)] * 4
            if shape.quantized:
                for step in range(shape.head_dim // 16):
                    sums = w.mma(sums, ones, fragments[2 * step : 2 * step + 2], self.half)
            words = [*fragments, *(w.arith.bitcast(w.i32_type(), x) for x in [*sums[:2], *rotation])]
            state = [w.f32(0.0)] * (shape.head_dim // 4) + [w.f32(LOWEST)] * 2 + [w.f32(0.0)] * 4
            return [_rebag(words, w.i32_type()), _rebag(state, w.f32_type())]

        return tuple(emit(query, *(bias or ())))

    def _query_fragments(self, thread, query):
        """Words of mma's B operand; columns past `share` repeat the last query and are never used."""
        shape = self.shape
        size = shape.head_dim * 2
        row = w.imul(w.imin(thread.g, shape.share - 1), size)
        words = []
        for at, count, extra in _key_pieces(shape, thread):
            # A piece of the cache's row covers `count` words; the query's elements have twice an 8-bit cache's size.
            ratio = 2 // shape.itemsize
            for half in range(ratio):
                where = w.iadd(row, w.imul(extra, ratio), at * ratio + half * count * 4)
                words += w.load_words(query, where, count)
        if self.half == "f16" and shape.dtype == "bfloat16":
            words = [w.pack(*w.unpack(word, "bf16"), "f16") for word in words]
        return words

    def _bias_terms(self, thread, query, pointers, head, slot, length):
        """Stores (q₁b₁ + q₂b₂, q₂b₁ − q₁b₂) of every pair, in log2 units; returns the rotation of the warp's first row."""
        shape = self.shape
        bias_GK, cos, sin, turned = pointers
        K, pairs = shape.head_dim, shape.head_dim // 2
        unit = shape.scale * math.log2(math.e) * BIAS_UNIT
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
            w.store_floats(turned, w.imul(index, 8), [with_cos, with_sin])
        start = w.imul(slot, length * pairs * 4)
        inverse = w.reciprocal(w.load_floats(cos, start)[0])
        row = w.imin(w.imul(thread.warp, 16 * shape.blocks), length - 1)
        rotation = []
        for piece in range(shape.pairs_a_lane):
            pair = w.imin(w.iadd(thread.lane, 32 * piece), pairs - 1)
            where = w.iadd(start, w.imul(w.iadd(w.imul(row, pairs), pair), 4))
            rotation += [w.mul(w.load_floats(table, where)[0], inverse) for table in (cos, sin)]
        return rotation

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
            bias: (cos, sin of the tile's first position: shared memory [K/2]; turned; table; scratch), or None.
        """
        shape = self.shape
        cache = plgpu.RefType(cache_transforms(shape))
        types = (_bag_layout(shape.setup), _bag_layout(shape.state), cache, cache)
        types += (plgpu.Layout.WG_SPLAT,) * 2 + (plgpu.RefType(),) * (len(scales) + len(bias or ()))

        @plgpu.inline_mgpu(arg_types=types, return_type=_bag(shape.state, jnp.float32))
        def emit(ctx, setup, state, keys, values, low, high, *refs):
            del ctx
            pointers = [utils.memref_ptr(ref) for ref in refs]
            new = self._tile(
                _unbag(setup),
                _unbag(state),
                utils.memref_ptr(keys),
                utils.memref_ptr(values),
                pointers[: len(scales)],
                (_scalar(low), _scalar(high)),
                pointers[len(scales) :],
            )
            return _rebag(new, w.f32_type())

        return emit(setup, state, keys, values, low, high, *scales, *(bias or ()))

    def _tile(self, setup, state, keys, values, scales, bounds, bias):
        shape = self.shape
        thread = _Thread.here()
        steps, outputs = shape.head_dim // 16, shape.head_dim // 4
        fragments, sums = setup[: 2 * steps], [w.arith.bitcast(w.f32_type(), x) for x in setup[2 * steps :]]
        acc, maximum, total, shift = state[:outputs], state[outputs : outputs + 2], state[-4:-2], state[-2:]
        first_row = w.imul(thread.warp, 16 * shape.blocks)
        unit = shape.scale * math.log2(math.e)
        if bias:
            self._turn(thread, sums[2:], bias)

        logits, rows = [], []
        for block in range(shape.blocks):
            logit, row = self._logits(thread, fragments, sums, keys, scales, first_row, block, unit, bounds)
            if bias:
                extra = self._bias_product(thread, block, bias)
                logit = [w.fma(x, w.f32(1 / BIAS_UNIT), y) for x, y in zip(extra, logit, strict=True)]
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
        pieces = _key_pieces(shape, thread)
        words = [
            _read_row(shape, keys, thread.g, w.iadd(first_row, 16 * block + 8 * half), pieces) for half in range(2)
        ]
        # Two chains of products, so that one's latency hides behind the other.
        acc = [[w.f32(0.0)] * 4, [w.f32(0.0)] * 4]
        for step in range(shape.head_dim // 16):
            if shape.quantized:
                a = [_bytes_to_halves(words[half][step], pick) for pick in (0x4140, 0x4342) for half in range(2)]
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
            middle = w.mul(w.fma(key_scale, w.f32(128.0), key_minimum), w.f32(unit))
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
        pieces = _value_pieces(shape, thread)
        words = [
            _read_row(shape, values, w.iadd(w.imul(thread.t, 2), odd), w.iadd(first_row, 16 * block + 8 * half), pieces)
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
                    operands.append([_bytes_to_halves(m, pick) for m in mixed for pick in (0x4140, 0x4342)])
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

    # -- the key bias ---------------------------------------------------------------------------------------------

    def _turn(self, thread, rotation, bias):
        """Turns the bias terms to the warp's first row and lays them out as mma's B operand, in two float16 parts."""
        shape = self.shape
        cos, sin, turned, _, scratch = bias
        pairs, chunks = shape.head_dim // 2, shape.head_dim // 32
        mine = w.imul(thread.warp, 2 * chunks * 32 * 16)
        for piece in range(shape.pairs_a_lane):
            pair = w.imin(w.iadd(thread.lane, 32 * piece), pairs - 1)
            c, s = (w.load_floats(ref, w.imul(pair, 4))[0] for ref in (cos, sin))
            c_row, s_row = rotation[2 * piece : 2 * piece + 2]
            c, s = w.sub(w.mul(c, c_row), w.mul(s, s_row)), w.fma(s, c_row, w.mul(c, s_row))
            place = w.iadd(mine, w.imul(w.idiv(pair, 16), 512))
            place = w.iadd(place, w.imul(w.idiv(w.irem(pair, 16), 4), 16), w.imul(w.irem(pair, 4), 4))
            for query in range(shape.share):
                with_cos, with_sin = w.load_floats(turned, w.iadd(w.imul(pair, 8), query * pairs * 8), 2)
                new_cos = w.fma(with_cos, c, w.mul(with_sin, s))
                new_sin = w.sub(w.mul(with_sin, c), w.mul(with_cos, s))
                for part, word in enumerate(_split(new_cos, new_sin)):
                    w.store_words(scratch, w.iadd(place, part * chunks * 512 + query * 64), [word])
        w.warp_barrier()

    def _bias_product(self, thread, block, bias):
        """The bias logits of a block, in BIAS_UNIT: high·high + high·low + low·high."""
        shape = self.shape
        table, scratch = bias[3:]
        chunks = shape.head_dim // 32
        column = w.iadd(w.imul(w.imin(thread.g, shape.share - 1), 4), thread.t)
        mine = w.iadd(w.imul(thread.warp, 2 * chunks * 512), w.imul(column, 16))
        acc = [[w.f32(0.0)] * 4 for _ in range(3)]
        for chunk in range(chunks):
            b = [w.load_words(scratch, w.iadd(mine, (part * chunks + chunk) * 512), 4) for part in range(2)]
            a = [
                [
                    w.load_words(
                        table,
                        w.iadd(w.imul(thread.lane, 16), (((2 * block + half) * chunks + chunk) * 2 + part) * 512),
                        4,
                    )
                    for half in range(2)
                ]
                for part in range(2)
            ]
            for step in range(2):
                left = [[rows[half][2 * step + e] for e in range(2) for half in range(2)] for rows in a]
                right = [words[2 * step : 2 * step + 2] for words in b]
                for index, (i, j) in enumerate(((0, 0), (0, 1), (1, 0))):
                    acc[index] = w.mma(acc[index], left[i], right[j], "f16")
        return [w.add(x, w.add(y, z)) for x, y, z in zip(*acc, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Row:
    """What a thread knows of one token: whether it counts; of its 8-bit value log2 and inverse of the scale, middle."""

    seen: ir.Value
    log2_scale: ir.Value | None = None
    inverse_scale: ir.Value | None = None
    minimum: ir.Value | None = None


def _decayed(acc, total, shift, maximum, renewed):
    """What was summed under the old maximum, under the new one; skipped where no query of the warp has a new one."""
    grown = [w.arith.cmpf(w.arith.CmpFPredicate.OLT, old, new) for old, new in zip(maximum, renewed, strict=True)]
    values = [*acc, *total, *shift]
    op = scf.IfOp(w.any_lane(w.arith.ori(*grown)), [w.f32_type()] * len(values), has_else=True)
    with ir.InsertionPoint(op.then_block):
        decay = [w.exp2(w.sub(old, new)) for old, new in zip(maximum, renewed, strict=True)]
        scf.YieldOp([w.mul(value, decay[index % 2]) for index, value in enumerate(values)])
    with ir.InsertionPoint(op.else_block):
        scf.YieldOp(values)
    new = list(op.results)
    return new[: len(acc)], new[-4:-2], new[-2:]


def _split(first, second):
    """Two floats as two words of float16 pairs whose sum has 22 bits: (high, low)."""
    high = w.pack(first, second, "f16")
    back = w.unpack(high, "f16")
    return high, w.pack(w.sub(first, back[0]), w.sub(second, back[1]), "f16")

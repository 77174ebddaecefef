"""Writes new tokens into the cache in place: rounding to 8 bits and the scatter, in one launch.

A warp takes one token of one key/value head, key and value together. A decode step's single token a slot is turned and
written by `mosaic_gpu_rotate_append`, which shares how a warp holds a head.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.tensor import KVArrays

WARPS = 4
HALVES = {"bfloat16": "bf16", "float16": "f16"}


@dataclasses.dataclass(frozen=True)
class AppendShape:
    """Static facts of an append.

    Attributes:
        cache: L, B, G, S, K.
        tokens: T, new tokens a slot.
        dtype: of the new keys and values, and of a 16-bit cache.
        quantized: 8-bit cache.
    """

    cache: tuple[int, int, int, int, int]
    tokens: int
    dtype: str
    quantized: bool

    @property
    def rows(self) -> int:
        """Rows of the new keys: slot, token, head."""
        return self.cache[1] * self.tokens * self.cache[2]


class FastAppend:
    """The work on one block's rows as inline code; tests hold a portable twin for the interpreter."""

    def __init__(self, shape: AppendShape):
        self.shape = shape

    def rows(self, block, layer, key, value, start, cache):
        """Rows 4·block … 4·block + 3. `cache`: keys, values and, for 8 bits, the four arrays of scales and minimums."""
        refs = [key, value, start, *cache]

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,) * 2 + (plgpu.RefType(),) * len(refs))
        def emit(ctx, block, layer, *refs):
            del ctx
            pointers = [utils.memref_ptr(ref) for ref in refs]
            _rows(self.shape, block.registers.item(), layer.registers.item(), pointers)

        emit(block, layer, *refs)


class Lane(NamedTuple):
    """The channels of a head that a lane holds: whole rotary pairs, so that turning them moves nothing between lanes.

    Attributes:
        head_dim: K.
        count: pairs a lane; it divides K/2, a multiple of 16.
        first: its first pair; lanes past the end hold the last pairs again.
        again: whether it is such a lane; None where no lane is.
    """

    head_dim: int
    count: int
    first: Any
    again: Any

    @classmethod
    def of(cls, head_dim: int, lane):
        """What lane 0 … 31 holds."""
        pairs = head_dim // 2
        count = 2 ** math.ceil(math.log2(max(pairs / 32, 1)))
        wanted = w.imul(lane, count)
        again = None if 32 * count == pairs else w.less(pairs - count, wanted)
        return cls(head_dim, count, w.imin(wanted, pairs - count), again)

    @property
    def channels(self):
        """First all first channels of the pairs, then all second ones; as every list of this head's numbers."""
        pairs = self.head_dim // 2
        return [w.iadd(self.first, part * pairs + index) for part in range(2) for index in range(self.count)]

    def load(self, pointer, start, dtype: str):
        """Its numbers, as floats, of the K elements that begin at a multiple of K."""
        base = w.element(pointer, start, 4 if dtype == "float32" else 2)
        return [x for part in range(2) for x in self._load(base, w.iadd(self.first, part * self.head_dim // 2), dtype)]

    def load_pairs(self, pointer, start):
        """One float32 for each of its pairs, of the K/2 that begin at a multiple of K/2."""
        return self._load(w.element(pointer, start, 4), self.first, "float32")

    def _load(self, base, channel, dtype: str):
        if dtype == "float32":
            return w.load_floats(base, w.imul(channel, 4), self.count)
        if self.count == 1:
            return [w.load_float_of(base, w.imul(channel, 2), dtype)]
        words = w.load_words(base, w.imul(channel, 2), self.count // 2)
        return [x for word in words for x in w.unpack(word, HALVES[dtype])]

    def store(self, pointer, start, row, dtype: str):
        """Its numbers, rounded to 16 bits, into the K elements that begin at a multiple of K."""
        base = w.element(pointer, start, 2)
        for part in range(2):
            channel, half = w.iadd(self.first, part * self.head_dim // 2), row[part * self.count :][: self.count]
            if self.count == 1:
                w.store_float_as(base, w.imul(channel, 2), half[0], dtype)
                continue
            words = [w.pack(a, b, HALVES[dtype]) for a, b in zip(half[::2], half[1::2], strict=True)]
            w.store_words(base, w.imul(channel, 2), words)

    def store_row(self, arrays, place, row, dtype: str):
        """A head's row of the cache: `arrays` its keys or values and, for 8 bits, their scales and minimums."""
        array, *facts = arrays
        base = w.element(array, place, self.head_dim * (1 if facts else 2))
        if not facts:
            self.store(base, w.i32(0), row, dtype)
            return
        units, *numbers = round_row(row)
        for channel, unit in zip(self.channels, units, strict=True):
            w.store_byte(base, channel, unit)
        for fact, number in zip(facts, numbers, strict=True):
            w.store_float_as(w.element(fact, place, 2), 0, number, "float16")


def place_of(cache: tuple[int, int, int, int, int], layer, slot, head, position):
    """(index of a token's row among those of the cache, whether the slot has that position)."""
    _, B, G, S, _ = cache
    place = w.iadd(w.imul(w.iadd(w.imul(w.iadd(w.imul(layer, B), slot), G), head), S), position)
    return place, w.both(w.less(-1, position), w.less(position, S))


def _rows(shape: AppendShape, block, layer, pointers):
    G, K = shape.cache[2], shape.cache[4]
    key, value, start, keys, values, *facts = pointers
    thread = w.thread_index()
    wanted = w.iadd(w.imul(block, WARPS), w.idiv(thread, 32))
    row = w.imin(wanted, shape.rows - 1)  # the last block's idle warps do the last row again
    head, token, slot = w.irem(row, G), w.irem(w.idiv(row, G), shape.tokens), w.idiv(row, G * shape.tokens)
    position = w.iadd(w.load_words(start, w.imul(slot, 4), 1)[0], token)
    mine = Lane.of(K, w.irem(thread, 32))
    x, y = (mine.load(pointer, w.imul(row, K), shape.dtype) for pointer in (key, value))
    place, fits = place_of(shape.cache, layer, slot, head, position)

    def write():
        mine.store_row([keys, *facts[:2]], place, x, shape.dtype)
        mine.store_row([values, *facts[2:]], place, y, shape.dtype)

    w.when(fits, write)


def round_row(row):
    """(8-bit units, scale, minimum) of the row a warp holds; the same numbers as `reference.quantize`."""
    low = high = row[0]
    for x in row[1:]:
        low, high = w.minimum(low, x), w.maximum(high, x)
    for distance in (1, 2, 4, 8, 16):
        low, high = w.minimum(low, w.shuffle_xor(low, distance)), w.maximum(high, w.shuffle_xor(high, distance))
    scale, minimum = w.round_to_float16(w.divide(w.sub(high, low), w.f32(255.0))), w.round_to_float16(low)
    constant = w.float_equal(scale, w.f32(0.0))
    step = w.select(constant, w.f32(1.0), scale)
    units = [w.select(constant, w.i32(0), w.to_byte(w.divide(w.sub(x, minimum), step))) for x in row]
    return units, scale, minimum


def build(shape: AppendShape, arithmetic=None, interpret=None):
    """The kernel: f(layer [1], key [B, T, G, K], value, start [B], cache refs), writing the refs."""
    arithmetic = arithmetic or FastAppend(shape)

    def body(layer, key, value, start, *cache):
        arithmetic.rows(lax.axis_index("block"), layer[0], key, value, start, cache)

    return plgpu.kernel(
        body,
        out_type=(),
        grid=(-(-shape.rows // WARPS),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=True),
        kernel_name="append",
        interpret=interpret,
    )


def append(kv: KVArrays, layer, key_BTGK, value_BTGK, start_B, *, arithmetic=None, interpret=None) -> KVArrays:
    """Writes T new tokens of one layer at positions start..start + T − 1 of each slot; positions past S are dropped.

    Args:
        kv: the cache, [L, B, G, S, K]; updated in place where its buffers are donated.
        layer: index, int or int32 scalar.
        key_BTGK: keys, turned; for an 8-bit cache without their bias.
        value_BTGK: values.
        start_B: int32 [B].
        arithmetic: for tests under the interpreter.
        interpret: likewise.
    """
    shape = AppendShape(kv.keys.shape, key_BTGK.shape[1], str(key_BTGK.dtype), kv.quantized)
    refs = jax.tree.map(jax.new_ref, kv)
    kernel = build(shape, arithmetic, interpret)
    kernel(jnp.asarray(layer, jnp.int32).reshape(1), key_BTGK, value_BTGK, start_B, *cache_refs(refs).values())
    return jax.tree.map(jax.freeze, refs)


def cache_refs(refs: KVArrays) -> dict[str, Any]:
    """The arrays that a cache has, by name: keys, values and, for 8 bits, scales and minimums, those of keys first."""
    named = {field.name: getattr(refs, field.name) for field in dataclasses.fields(refs)}
    return {name: ref for name, ref in named.items() if ref is not None}

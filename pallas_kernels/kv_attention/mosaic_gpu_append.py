"""Writes new tokens into the cache in place: key bias, rotary, rounding to 8 bits and the scatter, in one launch.

A warp takes one token of one key/value head, key and value together; a lane holds whole rotary pairs, so that turning
them moves nothing between lanes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.tensor import KVArrays

WARPS = 4


@dataclasses.dataclass(frozen=True)
class AppendShape:
    """Static facts of an append.

    Attributes:
        cache: L, B, G, S, K.
        tokens: T, new tokens a slot.
        dtype: of the new keys and values, and of a 16-bit cache.
        quantized: 8-bit cache.
        rotary: 0, or the leading size of the rotary tables (1 or B).
        bias_dtype: of the key bias, or None.
    """

    cache: tuple[int, int, int, int, int]
    tokens: int
    dtype: str
    quantized: bool
    rotary: int
    bias_dtype: str | None

    @property
    def rows(self) -> int:
        """Rows of the new keys: slot, token, head."""
        return self.cache[1] * self.tokens * self.cache[2]


class FastAppend:
    """The work on one block's rows as inline code; tests hold a portable twin for the interpreter."""

    def __init__(self, shape: AppendShape):
        self.shape = shape

    def rows(self, block, layer, key, value, start, rotary, bias, cache):
        """Rows 4·block … 4·block + 3. `cache`: keys, values and, for 8 bits, the four arrays of scales and minimums."""
        refs = [key, value, start, *rotary, *bias, *cache]

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,) * 2 + (plgpu.RefType(),) * len(refs))
        def emit(ctx, block, layer, *refs):
            del ctx
            pointers = [utils.memref_ptr(ref) for ref in refs]
            _rows(self.shape, block.registers.item(), layer.registers.item(), pointers)

        emit(block, layer, *refs)


def _rows(shape: AppendShape, block, layer, pointers):
    _, B, G, S, K = shape.cache
    key, value, start, *rest = pointers
    rotary, rest = (rest[:2], rest[2:]) if shape.rotary else ((), rest)
    bias, cache = (rest[:1], rest[1:]) if shape.bias_dtype else ((), rest)
    thread = w.thread_index()
    lane = w.irem(thread, 32)
    wanted = w.iadd(w.imul(block, WARPS), w.idiv(thread, 32))
    row = w.imin(wanted, shape.rows - 1)  # the last block's idle warps do the last row again
    head, token, slot = w.irem(row, G), w.irem(w.idiv(row, G), shape.tokens), w.idiv(row, G * shape.tokens)
    position = w.iadd(w.load_words(start, w.imul(slot, 4), 1)[0], token)

    pairs = K // 2
    mine = 2 ** math.ceil(math.log2(max(pairs / 32, 1)))  # pairs a lane; it divides K/2, a multiple of 16
    first = w.imin(w.imul(lane, mine), pairs - mine)  # lanes past the end do the last pairs again
    channels = [w.iadd(first, part * pairs + index) for part in range(2) for index in range(mine)]
    base = w.imul(row, K)
    x = [w.load_float_of(_at(key, w.iadd(base, channel), 2), 0, shape.dtype) for channel in channels]
    y = [w.load_float_of(_at(value, w.iadd(base, channel), 2), 0, shape.dtype) for channel in channels]
    if bias:
        width = 4 if shape.bias_dtype == "float32" else 2
        base = w.imul(head, K)
        for index, channel in enumerate(channels):
            x[index] = w.add(x[index], w.load_float_of(bias[0], w.imul(w.iadd(base, channel), width), shape.bias_dtype))
    if rotary:
        table = token if shape.rotary == 1 else w.iadd(w.imul(slot, shape.tokens), token)
        base = w.imul(table, pairs)
        cos, sin = ([w.load_floats(_at(ref, w.iadd(base, c), 4), 0)[0] for c in channels[:mine]] for ref in rotary)
        low, high = x[:mine], x[mine:]
        x = [w.sub(w.mul(a, c), w.mul(b, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
        x += [w.fma(b, c, w.mul(a, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]

    target = w.iadd(w.imul(w.iadd(w.imul(w.iadd(w.imul(layer, B), slot), G), head), S), position)  # [L, B, G, S]
    fits = w.both(w.less(-1, position), w.less(position, S))
    stored = [round_row(row) for row in (x, y)] if shape.quantized else None

    def write():
        for which, (row, array) in enumerate(zip((x, y), cache[:2], strict=True)):
            where = _at(array, target, K if shape.quantized else 2 * K)
            for index, channel in enumerate(channels):
                if not stored:
                    w.store_float_as(where, w.imul(channel, 2), row[index], shape.dtype)
                    continue
                w.store_byte(where, channel, stored[which][0][index])
        if stored:
            for which in range(2):
                for kind in range(2):
                    w.store_float_as(_at(cache[2 + 2 * which + kind], target, 2), 0, stored[which][1 + kind], "float16")

    w.when(fits, write)


def _at(pointer, index, size: int):
    """Address of an element by its index; 64-bit, for a cache may pass 2 GB."""
    return w.element(pointer, index, size)


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
    """The kernel: f(layer [1], key [B, T, G, K], value, start [B], rotary, bias, cache refs), writing the refs."""
    arithmetic = arithmetic or FastAppend(shape)

    def body(layer, key, value, start, rotary, bias, *cache):
        arithmetic.rows(lax.axis_index("block"), layer[0], key, value, start, rotary, bias, cache)

    return plgpu.kernel(
        body,
        out_type=(),
        grid=(-(-shape.rows // WARPS),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=True),
        kernel_name="append",
        interpret=interpret,
    )


def append(
    kv: KVArrays,
    layer,
    key_BTGK,
    value_BTGK,
    start_B,
    *,
    key_rotary=None,
    key_bias_GK=None,
    arithmetic=None,
    interpret=None,
) -> KVArrays:
    """Writes T new tokens of one layer at positions start..start + T − 1 of each slot; positions past S are dropped.

    Args:
        kv: the cache, [L, B, G, S, K]; updated in place where its buffers are donated.
        layer: index, int or int32 scalar.
        key_BTGK: keys; already turned unless key_rotary is given; for an 8-bit cache without their bias.
        value_BTGK: values.
        start_B: int32 [B].
        key_rotary: (cos, sin), float32 [B or 1, T, K/2], of the new tokens' positions: the keys are turned here.
        key_bias_GK: added to the keys before turning; for a 16-bit cache only.
        arithmetic: for tests under the interpreter.
        interpret: likewise.
    """
    if kv.quantized and key_bias_GK is not None:
        raise ValueError("key_bias_GK: an 8-bit cache holds keys without their bias; pass it to attend_decode instead.")
    T = key_BTGK.shape[1]
    rotary = () if key_rotary is None else tuple(table.astype(jnp.float32) for table in key_rotary)
    bias = () if key_bias_GK is None else (key_bias_GK,)
    shape = AppendShape(
        kv.keys.shape,
        T,
        str(key_BTGK.dtype),
        kv.quantized,
        rotary[0].shape[0] if rotary else 0,
        str(key_bias_GK.dtype) if bias else None,
    )
    refs = jax.tree.map(jax.new_ref, kv)
    cache = (refs.keys, refs.values)
    if kv.quantized:
        cache += (refs.key_scales, refs.key_minimums, refs.value_scales, refs.value_minimums)
    kernel = build(shape, arithmetic, interpret)
    kernel(jnp.asarray(layer, jnp.int32).reshape(1), key_BTGK, value_BTGK, start_B, rotary, bias, *cache)
    return jax.tree.map(jax.freeze, refs)

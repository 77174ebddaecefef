"""A decode step's new token between the fused projection and attention, in one launch: see `op.rotate_append`.

A warp takes one head of a row of the projection's result: a query is normed, turned and stored, a key normed, turned
and written into the cache, a value written. Everything is computed in float32 and rounded to the dtype where
`qwen_jax.model` rounds it; products and sums are rounded by themselves, so that results do not depend on a compiler.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_attention import warp as w
from pallas_kernels.kv_attention.mosaic_gpu_append import HALVES, WARPS, Lane, cache_refs, place_of
from pallas_kernels.kv_attention.tensor import KVArrays


@dataclasses.dataclass(frozen=True)
class RotateShape:
    """Static facts of a launch.

    Attributes:
        cache: L, B, G, S, K.
        heads: H, query heads.
        dtype: of the projection's result, the queries and a 16-bit cache.
        quantized: 8-bit cache.
        tables: leading size of the rotary tables (1 or B).
        logn: whether queries have a factor.
        norm_dtype: of the norms' scales, or None without norms.
        epsilon: added to a head's mean square.
        bias_dtype: of the key bias, or None.
    """

    cache: tuple[int, int, int, int, int]
    heads: int
    dtype: str
    quantized: bool
    tables: int
    logn: bool
    norm_dtype: str | None
    epsilon: float
    bias_dtype: str | None

    @property
    def width(self) -> int:
        """Heads of one row of the projection's result: queries, keys, values."""
        return self.heads + 2 * self.cache[2]

    @property
    def rows(self) -> int:
        """Heads of all rows."""
        return self.cache[1] * self.width


class FastRotate:
    """The work of one block as inline code; tests hold a portable twin for the interpreter."""

    def __init__(self, shape: RotateShape):
        self.shape = shape

    def rows(self, block, refs):
        """Heads 4·block … 4·block + 3 of all rows. `refs`: operands, cache and `query` by name, see `build`."""

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,) + (plgpu.RefType(),) * len(refs))
        def emit(ctx, block, *pointers):
            del ctx
            named = dict(zip(refs, map(utils.memref_ptr, pointers), strict=True))
            _rows(self.shape, block.registers.item(), named)

        emit(block, *refs.values())


def _rows(shape: RotateShape, block, pointers):
    G, K = shape.cache[2], shape.cache[4]
    thread = w.thread_index()
    wanted = w.iadd(w.imul(block, WARPS), w.idiv(thread, 32))
    row = w.imin(wanted, shape.rows - 1)  # the last block's idle warps do the last head again
    slot, head = w.idiv(row, shape.width), w.irem(row, shape.width)
    mine = Lane.of(K, w.irem(thread, 32))
    x = mine.load(pointers["qkv"], w.imul(row, K), shape.dtype)

    def write(kind: str, x, head):
        layer = w.load_words(pointers["layer"], 0, 1)[0]
        position = w.load_words(pointers["start"], w.imul(slot, 4), 1)[0]
        place, fits = place_of(shape.cache, layer, slot, head, position)
        arrays = [pointers[f"{kind}s"]]
        if shape.quantized:
            arrays += [pointers[f"{kind}_scales"], pointers[f"{kind}_minimums"]]
        w.when(fits, lambda: mine.store_row(arrays, place, x, shape.dtype))

    def query():
        y = _turned(shape, pointers, mine, _normed(shape, pointers, mine, x, "query_norm"), slot)
        if shape.logn:
            factor = w.load_floats(pointers["logn"], w.imul(slot, 4))[0]
            factor = _rounded(shape, [factor, factor])[0]
            y = [w.mul(value, factor) for value in y]
        mine.store(pointers["query"], w.imul(w.iadd(w.imul(slot, shape.heads), head), K), y, shape.dtype)

    def key():
        y, number = _normed(shape, pointers, mine, x, "key_norm"), w.iadd(head, -shape.heads)
        if shape.bias_dtype is not None:
            start = w.imul(w.iadd(w.imul(_stack_layer(pointers), G), number), K)
            bias = _rounded(shape, mine.load(pointers["key_bias"], start, shape.bias_dtype))
            y = _rounded(shape, [w.add(a, b) for a, b in zip(y, bias, strict=True)])
        write("key", _turned(shape, pointers, mine, y, slot), number)

    w.when(w.less(head, shape.heads), query)
    w.when(w.both(w.less(shape.heads - 1, head), w.less(head, shape.heads + G)), key)
    w.when(w.less(shape.heads + G - 1, head), lambda: write("value", x, w.iadd(head, -shape.heads - G)))


def _stack_layer(pointers):
    return w.load_words(pointers["stack_layer"], 0, 1)[0]


def _rounded(shape: RotateShape, values):
    """Rounded to the dtype, an even number of floats."""
    half = HALVES[shape.dtype]
    words = [w.pack(a, b, half) for a, b in zip(values[::2], values[1::2], strict=True)]
    return [x for word in words for x in w.unpack(word, half)]


def _normed(shape: RotateShape, pointers, mine: Lane, x, name: str):
    """RMS norm over a head."""
    if shape.norm_dtype is None:
        return x
    scale = mine.load(pointers[name], w.imul(_stack_layer(pointers), mine.head_dim), shape.norm_dtype)
    total = w.f32(0.0)
    for value in x:
        total = w.add(total, w.mul(value, value))
    if mine.again is not None:
        total = w.select(mine.again, w.f32(0.0), total)
    mean = w.divide(w.float_warp_sum(total), w.f32(mine.head_dim))
    inverse = w.divide(w.f32(1.0), w.sqrt(w.add(mean, w.f32(shape.epsilon))))
    return _rounded(shape, [w.mul(w.mul(value, inverse), s) for value, s in zip(x, scale, strict=True)])


def _turned(shape: RotateShape, pointers, mine: Lane, x, slot):
    """Turned by the new token's position."""
    start = w.imul(slot, mine.head_dim // 2) if shape.tables > 1 else w.i32(0)
    cos, sin = (mine.load_pairs(pointers[name], start) for name in ("cos", "sin"))
    low, high = x[: mine.count], x[mine.count :]
    first = [w.sub(w.mul(a, c), w.mul(b, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
    second = [w.add(w.mul(b, c), w.mul(a, s)) for a, b, c, s in zip(low, high, cos, sin, strict=True)]
    return _rounded(shape, [*first, *second])


def build(shape: RotateShape, arithmetic=None, interpret=None):
    """The kernel: f(operands, cache refs), both by name, writing the refs and returning the queries [B, H, K].

    Operands: qkv [B, (H + 2G) · K], layer [1], stack_layer [1], start [B], cos and sin [1 or B, K/2]; where the shape
    has them, logn [B], query_norm and key_norm [layers, K], key_bias [layers, G · K].
    """
    arithmetic = arithmetic or FastRotate(shape)
    _, B, _, _, K = shape.cache

    def body(operands, cache, query):
        arithmetic.rows(lax.axis_index("block"), {**operands, **cache, "query": query})

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, shape.heads, K), jnp.dtype(shape.dtype)),
        grid=(-(-shape.rows // WARPS),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=True),
        kernel_name="rotate_append",
        interpret=interpret,
    )


def prepare(
    qkv_BX,
    kv: KVArrays,
    layer,
    start_B,
    *,
    heads: int,
    rotary,
    logn_B=None,
    stack_layer=None,
    query_norm_LK=None,
    key_norm_LK=None,
    epsilon: float = 0.0,
    key_bias_LX=None,
):
    """(shape, operands of `build`) from the arguments of `op.rotate_append`."""
    K = kv.keys.shape[4]
    bias = None if kv.quantized else key_bias_LX  # an 8-bit cache holds keys without it
    norms = {"query_norm": query_norm_LK, "key_norm": key_norm_LK}
    given = {"logn": logn_B, "key_bias": bias} | norms
    cos, sin = (table.reshape(-1, K // 2) for table in rotary)
    operands = {"qkv": qkv_BX, "start": start_B, "cos": cos, "sin": sin}
    for name, index in (("layer", layer), ("stack_layer", layer if stack_layer is None else stack_layer)):
        operands[name] = jnp.asarray(index, jnp.int32).reshape(1)
    operands |= {name: array for name, array in given.items() if array is not None}
    shape = RotateShape(
        kv.keys.shape,
        heads,
        str(qkv_BX.dtype),
        kv.quantized,
        len(cos),
        logn_B is not None,
        None if query_norm_LK is None else str(query_norm_LK.dtype),
        epsilon,
        None if bias is None else str(bias.dtype),
    )
    return shape, operands


def rotate_append(qkv_BX, kv: KVArrays, layer, start_B, *, arithmetic=None, interpret=None, **options):
    """See `op.rotate_append`; `arithmetic` (a class like `FastRotate`) and `interpret` are for tests."""
    shape, operands = prepare(qkv_BX, kv, layer, start_B, **options)
    refs = jax.tree.map(jax.new_ref, kv)
    query_BHK = build(shape, arithmetic and arithmetic(shape), interpret)(operands, cache_refs(refs))
    return query_BHK, jax.tree.map(jax.freeze, refs)

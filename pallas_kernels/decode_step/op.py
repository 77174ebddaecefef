"""The public op: one decode step of a block of alike layers in one launch, and which shapes it takes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_step import plan as plans
from pallas_kernels.decode_step.group import Group, inbox_shape
from pallas_kernels.kv_attention.tensor import KVArrays
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.layout_mosaic_gpu import LAYOUT

# Chips whose every multiprocessor holds one block: all must run at once, for they wait for each other.
MULTIPROCESSORS = {
    "NVIDIA H100 80GB HBM3": 132,
    "NVIDIA H100 SXM5 80GB": 132,
    "NVIDIA H100 SXM5": 132,
    "NVIDIA H200": 132,
    "NVIDIA GH200 480GB": 132,
}
WARPS = 8
MOST_ROWS = 8
DIRECT_WIDTH = 4096  # D of `Plan.direct`; at 5120 norming 8 rows spills registers: no faster than a kernel at a time
WIDE_ROWS = 5  # the most of a larger D: on two cards 8 rows of 5120 would fit, 4.5 ms, a kernel at a time 4.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """Weights of L alike layers, each leaf stacked over them.

    Attributes:
        qkv: QuantizedTensor [L, D, (H + 2G) · K], layout "mosaic_gpu": query, key and value heads side by side.
        output: [L, H · K, D].
        gate_up: [L, D, 2F]: gate, then up.
        down: [L, F, D].
        attention_norm: [L, D], as mlp_norm.
        mlp_norm: see attention_norm.
        qkv_bias: [L, (H + 2G) · K] or None; zero at the keys, whose bias is `key_bias`.
        key_bias: [L, G · K] or None.
        query_norm: [L, K] or None, as key_norm.
        key_norm: see query_norm.
    """

    qkv: QuantizedTensor
    output: QuantizedTensor
    gate_up: QuantizedTensor
    down: QuantizedTensor
    attention_norm: Any
    mlp_norm: Any
    qkv_bias: Any = None
    key_bias: Any = None
    query_norm: Any = None
    key_norm: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """What all steps of a cache share; made once for many steps, for each array is a launch.

    Attributes:
        cos: float32 [B or 1, S, K/2], of all positions of the cache.
        sin: likewise.
        counters: int32 [32], zero; the kernel counts in it and leaves it zero.
        logn_S: float32 [S], factor of the queries by position, or None.
    """

    cos: Any
    sin: Any
    counters: Any
    logn_S: Any = None

    @classmethod
    def of(cls, cos, sin, logn_S=None) -> "Tables":
        """With fresh counters."""
        return cls(cos, sin, jax.lax.optimization_barrier(jnp.zeros(32, jnp.int32)), logn_S)


MATRICES = ("qkv", "output", "gate_up", "down")


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """What `unsupported` depends on.

    Attributes:
        batch: rows of x.
        hidden: D.
        heads: H.
        kv_heads: G.
        head_dim: K.
        inner: F.
        layers: L.
        length: S of the cache.
        cache: elements of the cache, layers · B · G · S.
        quantized: 8-bit cache.
        dtype: of x.
        norm_dtype: of the norms.
        biased: whether keys have a bias.
        matrices: (name, bits, group_size, scales' dtype, symmetric, act-order, layout) of each projection.
    """

    batch: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    layers: int
    length: int
    cache: int
    quantized: bool
    dtype: str
    norm_dtype: str
    biased: bool
    matrices: tuple[tuple[str, int, int, str, bool, bool, str], ...]


def shape_of(x_BD, weights: LayerWeights, kv: KVArrays) -> DecodeShape:
    """The `DecodeShape` of a call."""
    layers, _, kv_heads, length, head_dim = kv.keys.shape
    facts = []
    for name in MATRICES:
        tensor = getattr(weights, name)
        facts.append(
            (name, tensor.bits, tensor.group_size, jnp.dtype(tensor.scales.dtype).name, tensor.zeros is None,
             tensor.permutation is not None, tensor.layout)
        )  # fmt: skip
    return DecodeShape(
        batch=x_BD.shape[0],
        hidden=x_BD.shape[1],
        heads=weights.output.in_features // head_dim,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=weights.down.in_features,
        layers=weights.qkv.stack[0] if weights.qkv.stack else 0,
        length=length,
        cache=layers * kv.keys.shape[1] * kv_heads * length,
        quantized=kv.quantized,
        dtype=jnp.dtype(x_BD.dtype).name,
        norm_dtype=jnp.dtype(weights.attention_norm.dtype).name,
        biased=weights.key_bias is not None,
        matrices=tuple(facts),
    )


def unsupported(shape: DecodeShape, chip: str) -> str | None:
    """None, or one sentence why the kernel cannot run `shape` on `chip`."""
    if chip not in MULTIPROCESSORS:
        return f"it needs a chip of known size, all of whose blocks run at once ({', '.join(MULTIPROCESSORS)})"
    if not 1 <= shape.batch <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {shape.batch}"
    if shape.dtype != "bfloat16" or shape.norm_dtype not in ("bfloat16", "float32"):
        return f"it computes in bfloat16 with norms in bfloat16 or float32, not {shape.dtype} and {shape.norm_dtype}"
    if not shape.layers:
        return "its weights are stacked over the layers"
    if shape.head_dim != 128 or shape.heads % shape.kv_heads or shape.heads // shape.kv_heads > 8:
        return (
            f"its heads have 128 channels, 1 to 8 of them a key/value head, not {shape.head_dim} channels and "
            f"{shape.heads} for {shape.kv_heads}"
        )
    if shape.length % 16:
        return f"its cache's length is a multiple of 16, not {shape.length}"
    if shape.cache >= 2**31:
        return f"its cache holds fewer than 2^31 tokens of all layers and heads, not {shape.cache}"
    if shape.hidden % 128 or shape.inner % 128:
        return f"its widths are multiples of 128, not {shape.hidden} and {shape.inner}"
    for name, bits, group_size, scale_dtype, _, permuted, layout in shape.matrices:
        if layout != LAYOUT:
            return f"it reads layout {LAYOUT!r}, {name} is in {layout!r}: prepack the weight"
        if bits not in (4, 8):
            return f"it takes 4 or 8 bits, {name} has {bits}"
        if permuted:
            return f"it does not gather activations, {name} has act-order"
        if scale_dtype not in ("bfloat16", "float16"):
            return f"its scales are bfloat16 or float16, those of {name} are {scale_dtype}"
        if not (group_size in (32, 64) or group_size % 128 == 0):
            return f"it takes groups of 32, 64 or a multiple of 128, {name} has {group_size}"
    try:
        plan = plan_for(shape, MULTIPROCESSORS[chip])
    except ValueError as error:
        return str(error)
    if plan.slots < 2 * plan.warps:
        return f"{shape.batch} rows of {plan.staged_width} leave too little shared memory"
    if shape.batch > WIDE_ROWS and shape.hidden > DIRECT_WIDTH:
        return f"a kernel at a time is faster for more than {WIDE_ROWS} rows of {shape.hidden}"
    return None


def plan_for(shape: DecodeShape, blocks: int, *, warps: int = WARPS, slots: int | None = None, **facts):
    """The `Plan` of a shape; `facts` are its fields that the shape does not tell (defaults serve `unsupported`)."""
    K, qkv_out = shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {
        "qkv": (shape.hidden, qkv_out, 1),
        "output": (shape.heads * K, shape.hidden, 1),
        "gate_up": (shape.hidden, 2 * shape.inner, 2),
        "down": (shape.inner, shape.hidden, 1),
    }
    matrices = []
    for name, bits, group_size, scale_dtype, symmetric, _, _ in shape.matrices:
        rows, columns, halves = sizes[name]
        most = 4 if symmetric or group_size >= 64 else 3
        parts, width, deep = plans.divide(
            name, columns // halves, halves, bits, warps, blocks, rows // plans.CHUNK, most
        )
        matrices.append(
            plans.Matrix(name, rows, columns, halves, bits, group_size, scale_dtype, -(-columns // 64) * 64,
                         symmetric, parts, width, deep)
        )  # fmt: skip
    defaults = dict(
        cache_layers=shape.layers, first_layer=0, epsilon=1e-6, scale=K**-0.5, window=None, bias_dtype=None,
        key_bias_dtype="bfloat16" if shape.biased else None, qk_norm=False, logn=False, table_rows=1, skip=(),
        splits=plans.splits_for(shape.batch * shape.kv_heads, blocks, shape.length, shape.heads // shape.kv_heads),
    )  # fmt: skip
    plan = plans.Plan(
        layers=shape.layers, batch=shape.batch, hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads,
        inner=shape.inner, head_dim=K, length=shape.length, quantized=shape.quantized, norm_dtype=shape.norm_dtype,
        matrices=tuple(matrices), blocks=blocks, warps=warps, slots=0, **(defaults | facts),
    )  # fmt: skip
    room = _room(plan)
    if room < 2 * warps and "direct" not in facts and shape.hidden <= DIRECT_WIDTH:
        plan = dataclasses.replace(plan, direct=True)
        room = _room(plan)
    room = room if slots is None else min(slots, room)
    return dataclasses.replace(plan, slots=room // warps * warps)


def _room(plan: plans.Plan) -> int:
    """Slots of the ring that fit beside all else."""
    _, rest = plan.regions()
    return (plans.SHARED_BYTES - rest - 3 * 128) // (plans.SLOT_BYTES + plan.extra_stride + 16)


def operands(x_BD, weights: LayerWeights, start_B, tables: Tables):
    """The kernel's inputs by name."""
    found = {
        "x": x_BD,
        "start": start_B.astype(jnp.int32),
        "counters": tables.counters,
        "cos": tables.cos,
        "sin": tables.sin,
        "attention_norm": weights.attention_norm,
        "mlp_norm": weights.mlp_norm,
    }
    for name in MATRICES:
        tensor = getattr(weights, name)
        found[f"{name}.packed"], found[f"{name}.scales"] = tensor.packed, tensor.scales
        if tensor.zeros is not None:
            found[f"{name}.zeros"] = tensor.zeros
    for name in ("qkv_bias", "key_bias", "query_norm", "key_norm"):
        if getattr(weights, name) is not None:
            found[name] = getattr(weights, name)
    if tables.logn_S is not None:
        found["logn"] = tables.logn_S
    return found


def run(
    x_BD: jax.Array,
    weights: LayerWeights,
    kv: KVArrays,
    start_B: jax.Array,
    tables: Tables,
    *,
    chip: str,
    epsilon: float,
    sliding_window: int | None = None,
    first_layer: int = 0,
    axis: str | None = None,
    plan_options: dict[str, Any] | None = None,
) -> tuple[jax.Array, KVArrays]:
    """(hidden after all layers [B, D], the cache with the new token), one token a row; in place if kv is donated.

    Args:
        x_BD: bfloat16 [B, D], the tokens' embeddings or the block before.
        weights: of the block's layers.
        kv: the cache, [cache layers, B, G, S, K], bfloat16 or 8 bits.
        start_B: int32 [B], tokens in the cache before the new one, which is written at that place.
        tables: for cos and sin of all S positions.
        chip: `device_kind`; must not be `unsupported`.
        epsilon: of all norms.
        sliding_window: only the newest so many tokens are seen; None for all.
        first_layer: the cache's layer of the block's first.
        axis: under a `shard_map` over all axes, the mesh axis whose cards hold shares of the heads and of F: `output`
            and `down` have a share's rows, and their sums over the cards are taken inside the launch. One process owns
            all cards of the mesh, numbered in its order.
        plan_options: for tuning: fields of `plan.Plan`.

    Raises:
        ValueError: the shape is unsupported.
    """
    shape = shape_of(x_BD, weights, kv)
    if (reason := unsupported(shape, chip)) is not None:
        raise ValueError(f"decode_step on {chip}: {reason}.")

    def name_of(array):
        return None if array is None else jnp.dtype(array.dtype).name

    group = None if axis is None else Group.here(axis)
    group = None if group is None or group.size == 1 else group
    plan = plan_for(
        shape,
        MULTIPROCESSORS[chip],
        **(
            dict(
                cards=1 if group is None else group.size,
                cache_layers=kv.keys.shape[0],
                first_layer=first_layer,
                epsilon=epsilon,
                window=sliding_window,
                bias_dtype=name_of(weights.qkv_bias),
                key_bias_dtype=name_of(weights.key_bias),
                qk_norm=weights.query_norm is not None,
                logn=tables.logn_S is not None,
                table_rows=tables.cos.shape[0],
            )
            | (plan_options or {})
        ),
    )
    return call(plan, x_BD, weights, kv, start_B, tables, group)


def call(plan, x_BD, weights, kv: KVArrays, start_B, tables: Tables, group: Group | None = None):
    """`run` with a plan."""
    from pallas_kernels.decode_step import kernel  # Mosaic GPU takes 0.6 s to import: only where a GPU runs it

    inputs = operands(x_BD, weights, start_B, tables)
    refs = jax.tree.map(jax.new_ref, kv)
    cached = tuple(name for name in kernel.CACHE if getattr(refs, name) is not None)
    arrays = [getattr(refs, name) for name in cached]
    if group is not None:
        cached, arrays = (*cached, "inbox"), [*arrays, jax.new_ref(jnp.zeros(inbox_shape(plan), jnp.int32))]
    launch = kernel.build(plan, tuple(inputs), cached, group)
    hidden_BD, *_ = launch(*inputs.values(), *arrays)
    return hidden_BD, jax.tree.map(jax.freeze, refs)

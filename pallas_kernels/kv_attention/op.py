"""Attention over a key/value cache: the public functions, and the choice of a kernel.

A kernel module offers `unsupported(shape, chip)` (None, or one sentence why not) and `attend_decode`, `append`. One
with TAKES_STACKED_BIAS reads its layer's entry of a stacked key bias itself, which saves a launch. One with
`rotate_append` does what lies between the fused projection and attention in one launch.
"""

import dataclasses
import functools
import logging

from pallas_kernels.chip import default_chip
from pallas_kernels.kv_attention import exact, mosaic_gpu, mosaic_tpu, mosaic_tpu_prefill, xla
from pallas_kernels.kv_attention.tensor import KVArrays
from pallas_kernels.quantized_matmul.stack import take_layer

# Best first; xla takes everything, and exact runs only where it is named.
KERNELS = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu, "xla": xla, "exact": exact}

_logger = logging.getLogger("pallas_kernels")


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What the choice of a kernel depends on."""

    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    quantized: bool
    dtype: str
    share: bool = False  # one of several shares of a cache that is split along its length
    window: bool = False  # told of a share only: its window differs from slot to slot


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel that runs, and why better ones do not."""

    name: str
    refusals: tuple[tuple[str, str], ...] = ()


@functools.cache
def choose(shape: AttentionShape, chip: str, kernels: str = "auto") -> Choice:
    """Names the kernel for decode attention.

    Args:
        shape: sizes and dtypes.
        chip: `jax.Device.device_kind`.
        kernels: "auto" or a key of `KERNELS`.

    Raises:
        ValueError: the named kernel does not exist or cannot run this shape; the message says why.
    """
    if kernels not in ("auto", *KERNELS):
        raise ValueError(f"kernels={kernels!r} is none of {['auto', *KERNELS]}.")
    refusals = {}
    for name in KERNELS if kernels == "auto" else [kernels]:
        reason = KERNELS[name].unsupported(shape, chip)
        if reason is None:
            _logger.info("kv_attention: %s on %s for %s", name, chip, shape)
            return Choice(name, tuple(refusals.items()))
        refusals[name] = reason
    raise ValueError(f"kernels={kernels!r} cannot run {shape} on {chip}: {refusals[kernels]}")


def _choice(kv: KVArrays, heads: int, dtype, kernels: str, share: bool = False, window: bool = False) -> Choice:
    _, slots, kv_heads, length, head_dim = kv.keys.shape
    shape = AttentionShape(slots, heads, kv_heads, head_dim, length, kv.quantized, str(dtype), share, window)
    return choose(shape, default_chip(), kernels)


def _kernel(*arguments):
    return KERNELS[_choice(*arguments).name]


def append(
    kv: KVArrays, layer, key_BTGK, value_BTGK, start_B, *, heads: int, kernels: str = "auto", share: bool = False
) -> KVArrays:
    """Writes T new tokens of one layer at positions start..start + T − 1 of each slot; under jit in place if donated.

    Args:
        kv: the cache, [L, B, G, S, K].
        layer: index, int or traced int32.
        key_BTGK: rotated keys; for an 8-bit cache without their bias.
        value_BTGK: values.
        start_B: int32 [B], the first position written in each slot.
        heads: query heads, for the choice of kernel.
        kernels: as in `choose`.
        share: the cache is one of several shares of a longer one: a single token whose start is −1 lies in another and
            is not written.
    """
    kernel = _kernel(kv, heads, key_BTGK.dtype, kernels, share)
    options = {"share": True} if share else {}
    return kernel.append(kv, layer, key_BTGK, value_BTGK, start_B, **options)


def rotate_append_unsupported(kv: KVArrays, heads: int, dtype, kernels: str = "auto") -> str | None:
    """None where `rotate_append` runs, or one sentence why it does not; arguments as of `append`, dtype of the keys."""
    choice = _choice(kv, heads, dtype, kernels)
    if hasattr(KERNELS[choice.name], "rotate_append"):
        return None
    return dict(choice.refusals).get("mosaic_gpu", f"kernels={kernels!r} is asked for")


def rotate_append(
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
    kernels: str = "auto",
):
    """Norms and turns one new token's queries and key, and writes its key and value into the cache; in one launch.

    Only where `rotate_append_unsupported` says None. Every step is rounded to the dtype of qkv_BX as in
    `qwen_jax.model.Attention`, which does the same elsewhere.

    Args:
        qkv_BX: the fused projection's result, bfloat16 or float16 [B, (H + 2G) · K]: queries, keys, values, side by
            side; keys without their bias.
        kv: the cache, [L, B, G, S, K]; under jit in place if donated.
        layer: index, int or traced int32, of the cache.
        start_B: int32 [B], the new token's position; one outside of the cache is not written.
        heads: H.
        rotary: (cos, sin), float32 [B or 1, 1, K/2], of these positions.
        logn_B: float32 [B], the factor of each row's queries; None for none.
        stack_layer: index of the arrays below; None where it is `layer`.
        query_norm_LK: scales of the queries' RMS norm over a head, stacked over layers; None without norms.
        key_norm_LK: of the keys'.
        epsilon: of both norms.
        key_bias_LX: [layers, G · K], added to the normed keys; an 8-bit cache holds keys without it.
        kernels: as in `choose`.

    Returns:
        (queries [B, H, K], the cache).

    Raises:
        ValueError: no kernel takes this, or qkv_BX has another shape.
    """
    if (reason := rotate_append_unsupported(kv, heads, qkv_BX.dtype, kernels)) is not None:
        raise ValueError(f"rotate_append: {reason}; expected the steps one by one (`append` and what is before it).")
    _, B, G, _, K = kv.keys.shape
    if qkv_BX.shape != (B, (heads + 2 * G) * K):
        raise ValueError(f"qkv_BX: shape {qkv_BX.shape}, expected {(B, (heads + 2 * G) * K)}: queries, keys, values.")
    return _kernel(kv, heads, qkv_BX.dtype, kernels).rotate_append(
        qkv_BX,
        kv,
        layer,
        start_B,
        heads=heads,
        rotary=rotary,
        logn_B=logn_B,
        stack_layer=stack_layer,
        query_norm_LK=query_norm_LK,
        key_norm_LK=key_norm_LK,
        epsilon=epsilon,
        key_bias_LX=key_bias_LX,
    )


def attend_decode(
    query_BHK,
    kv: KVArrays,
    layer,
    lengths_B,
    *,
    scale: float,
    key_bias_GK=None,
    key_bias_layer=None,
    key_rotary=None,
    sliding_window=None,
    active_length: int | None = None,
    kernels: str = "auto",
    share: bool = False,
):
    """Attention of one new token a slot over its cache: softmax(scale · q·k) · v.

    Args:
        query_BHK: rotated queries; query head h reads key/value head h // (H / G).
        kv: the cache; scales are applied to logits and probabilities, so its bytes are read once.
        layer: index, int or traced int32.
        lengths_B: int32 [B], valid tokens in each slot, the newest (this query's own) included.
        scale: factor on the logits.
        key_bias_GK: the keys' un-rotated bias, for an 8-bit cache whose keys were stored without it. It is added back
            exactly: q·R_p b = Σᵢ (q₁b₁ + q₂b₂)·cosₚᵢ + (q₂b₁ − q₁b₂)·sinₚᵢ over the pairs i of a head.
        key_bias_layer: which entry, where key_bias_GK is stacked over layers; None where it is not.
        key_rotary: (cos, sin), float32 [B or 1, S, K/2], the tables the keys were rotated with; goes with key_bias_GK.
        sliding_window: only the newest so many tokens are seen; None for all.
        active_length: no slot holds more tokens than this; the xla form reads only that much of the cache.
        kernels: as in `choose`.
        share: the cache is one of several shares of a longer one: lengths are those of the share, 0 for a slot of which
            nothing lies in it; a row of key_rotary is the rotation of the token there, all as far from one another; a
            sliding window is int32 [B, 1], for a share sees now one token more, now one less.

    Returns:
        [B, H, K] in the dtype of the query. With `share` (float32 [B, H, K], float32 [B, H]): the attention within the
        share, and the logarithm of its softmax's denominator, with which shares are merged; where it sees no token the
        one is finite and the other below −1e29.
    """
    window = share and sliding_window is not None
    kernel = _kernel(kv, query_BHK.shape[1], query_BHK.dtype, kernels, share, window)
    if key_bias_layer is not None and not getattr(kernel, "TAKES_STACKED_BIAS", False):
        key_bias_GK, key_bias_layer = take_layer(key_bias_GK, key_bias_layer), None
    stacked = {} if key_bias_layer is None else {"key_bias_layer": key_bias_layer}
    stacked |= {"share": True} if share else {}
    return kernel.attend_decode(
        query_BHK,
        kv,
        layer,
        lengths_B,
        scale=scale,
        key_bias_GK=key_bias_GK,
        key_rotary=key_rotary,
        sliding_window=sliding_window,
        active_length=active_length,
        **stacked,
    )


def attend_prefill(
    query_BTHK,
    key_BTGK,
    value_BTGK,
    lengths_B,
    *,
    scale: float,
    sliding_window: int | None = None,
    kernels: str = "auto",
):
    """Causal attention among the tokens of a prompt, right-padded rows of `lengths_B` valid tokens.

    On a GPU in 16 bits it is cuDNN's flash attention through `jax.nn.dot_product_attention`, on a TPU JAX's splash
    attention where shapes allow; elsewhere XLA, in blocks of queries; with `kernels` "exact" the form
    whose bits depend on nothing beside a head. Rows past a length hold arbitrary finite numbers.

    Returns:
        [B, T, H, K] in the dtype of the query.
    """
    if kernels == "exact":
        return exact.attend_prefill(query_BTHK, key_BTGK, value_BTGK, scale=scale, sliding_window=sliding_window)
    tokens, head_dim = query_BTHK.shape[1], query_BTHK.shape[3]
    if mosaic_tpu_prefill.unsupported(tokens, head_dim, str(query_BTHK.dtype), default_chip()) is None:
        return mosaic_tpu_prefill.attend_prefill(
            query_BTHK, key_BTGK, value_BTGK, scale=scale, sliding_window=sliding_window
        )
    return xla.attend_prefill(query_BTHK, key_BTGK, value_BTGK, lengths_B, scale=scale, sliding_window=sliding_window)

"""Causal attention in rows that hold several texts, for training: no token sees another text's."""

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30  # far below any logit, and finite: a softmax over it alone is no NaN
QUERY_BLOCK = 512  # queries whose logits are in memory at a time, on the way back too


def attend_segments(query_BTHK, key_BTGK, value_BTGK, segments_BT, *, scale: float, sliding_window: int | None = None):
    """softmax(scale · q·k) · v over the earlier tokens of the same segment.

    Plain XLA on every platform: logits and sums in float32, blocks of queries that are computed once more on the way
    back instead of being kept.

    Args:
        query_BTHK: rotated queries; query head h reads key/value head h // (H / G).
        key_BTGK: rotated keys, bias included.
        value_BTGK: values.
        segments_BT: int32 [B, T]; equal numbers of one row see each other.
        scale: factor on the logits.
        sliding_window: only the newest so many tokens are seen; None for all.

    Returns:
        [B, T, H, K] in the dtype of the query.
    """
    B, T, H, K = query_BTHK.shape
    G = key_BTGK.shape[2]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else query_BTHK.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    query_BTGQK = query_BTHK.astype(dtype).reshape(B, T, G, H // G, K)
    key_BTGK, value_BTGK = key_BTGK.astype(dtype), value_BTGK.astype(dtype)
    position_S = jnp.arange(T)

    @jax.checkpoint
    def block(query_BtGQK, segments_Bt, position_t):
        logits_BGQtS = jnp.einsum(
            "BTGQK,BSGK->BGQTS", query_BtGQK, key_BTGK, precision=precision, preferred_element_type=jnp.float32
        )
        seen_BtS = (position_S <= position_t[:, None]) & (segments_Bt[:, :, None] == segments_BT[:, None])
        if sliding_window is not None:
            seen_BtS &= position_S > position_t[:, None] - sliding_window
        weight_BGQtS = jax.nn.softmax(jnp.where(seen_BtS[:, None, None], logits_BGQtS * scale, MASKED), axis=-1)
        return jnp.einsum(
            "BGQTS,BSGK->BTGQK",
            weight_BGQtS.astype(dtype),
            value_BTGK,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    size = _block(T)
    if size == T:
        attended = block(query_BTGQK, segments_BT, position_S)
    else:
        parts = (
            jnp.moveaxis(query_BTGQK.reshape(B, T // size, size, G, H // G, K), 1, 0),
            jnp.moveaxis(segments_BT.reshape(B, T // size, size), 1, 0),
            position_S.reshape(T // size, size),
        )
        attended = jnp.moveaxis(lax.map(lambda part: block(*part), parts), 0, 1)
    return attended.reshape(B, T, H, K).astype(query_BTHK.dtype)


def _block(tokens: int) -> int:
    """Queries a block: the largest divisor of `tokens` up to `QUERY_BLOCK`, all of them where that is tiny."""
    size = next(size for size in range(min(QUERY_BLOCK, tokens), 0, -1) if tokens % size == 0)
    return size if size >= 64 else tokens

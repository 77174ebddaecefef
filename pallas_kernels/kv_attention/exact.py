"""Attention of a head whose bits do not depend on which heads and slots a device has beside it (`exact_sums`)."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.exact_sums import product, scaled, turn
from pallas_kernels.kv_attention import xla
from pallas_kernels.kv_attention.xla import MASKED, QUERY_BLOCK, read_layer


def unsupported(shape, chip: str) -> str | None:
    """None, or why this kernel cannot run."""
    del chip
    return "shares of a cache are merged in an order of their own" if shape.share else None


def append(kv, layer, key_BTGK, value_BTGK, start_B):
    """Writes T tokens of one layer; see `op.append`."""
    key_BTGK, value_BTGK = lax.optimization_barrier((key_BTGK, value_BTGK))
    return xla.append(kv, layer, key_BTGK, value_BTGK, start_B, keep_apart=lax.optimization_barrier)


def attend_decode(query_BHK, kv, layer, lengths_B, *, scale, key_bias_GK, key_rotary, sliding_window, active_length):
    """One new token a slot over the cache; see `op.attend_decode`."""
    query_BHK = lax.optimization_barrier(query_BHK)
    B, H, K = query_BHK.shape
    G = kv.keys.shape[2]
    S = min(active_length or kv.keys.shape[3], kv.keys.shape[3])

    def read(array, scales, minimums):
        values = read_layer(array, layer, S)
        if scales is None:
            return values
        return scaled(values, read_layer(scales, layer, S)[..., None], read_layer(minimums, layer, S)[..., None])

    query_BGQK = query_BHK.astype(jnp.float32).reshape(B, G, H // G, K) * scale
    keys_BGSK = read(kv.keys, kv.key_scales, kv.key_minimums)
    logits_BGQS = product(query_BGQK, jnp.swapaxes(keys_BGSK, -1, -2))
    if kv.quantized and key_bias_GK is not None:
        cos_BSK, sin_BSK = (table[:, None, :S] for table in key_rotary)
        first, second = jnp.split(key_bias_GK.astype(jnp.float32)[None, :, None], 2, axis=-1)
        bias_BGSK = jnp.concatenate(turn(first, second, cos_BSK, sin_BSK), axis=-1)
        logits_BGQS = logits_BGQS + product(query_BGQK, jnp.swapaxes(bias_BGSK, -1, -2))
    position_S = jnp.arange(S)
    seen_BS = position_S < lengths_B[:, None]
    if sliding_window is not None:
        seen_BS &= position_S >= lengths_B[:, None] - sliding_window
    values_BGSK = read(kv.values, kv.value_scales, kv.value_minimums)
    return _weighted(logits_BGQS, seen_BS[:, None, None], values_BGSK).reshape(B, H, K).astype(query_BHK.dtype)


def attend_prefill(query_BTHK, key_BTGK, value_BTGK, *, scale, sliding_window):
    """Causal attention within a prompt; see `op.attend_prefill`."""
    query_BTHK = lax.optimization_barrier(query_BTHK)
    B, T, H, K = query_BTHK.shape
    G = key_BTGK.shape[2]
    query_BGQTK = jnp.moveaxis((query_BTHK.astype(jnp.float32) * scale).reshape(B, T, G, H // G, K), 1, 3)
    key_BGKS = jnp.moveaxis(key_BTGK.astype(jnp.float32), 1, 3)
    value_BGSK = jnp.moveaxis(value_BTGK.astype(jnp.float32), 1, 2)
    position_S = jnp.arange(T)

    def block(operands):
        query_BGQtK, position_t = operands
        size = (H // G) * len(position_t)
        logits_BGQtS = product(query_BGQtK.reshape(B, G, size, K), key_BGKS).reshape(B, G, H // G, -1, T)
        seen_tS = position_S <= position_t[:, None]
        if sliding_window is not None:
            seen_tS &= position_S > position_t[:, None] - sliding_window
        weighted = _weighted(logits_BGQtS.reshape(B, G, size, T), jnp.tile(seen_tS, (H // G, 1)), value_BGSK)
        return weighted.reshape(B, G, H // G, -1, K)

    if T <= QUERY_BLOCK or T % QUERY_BLOCK:
        attended_BGQTK = block((query_BGQTK, position_S))
    else:
        blocks = T // QUERY_BLOCK
        parts = jnp.moveaxis(query_BGQTK.reshape(B, G, H // G, blocks, QUERY_BLOCK, K), 3, 0)
        parts = lax.map(block, (parts, position_S.reshape(blocks, QUERY_BLOCK)))
        attended_BGQTK = jnp.moveaxis(parts, 0, 3).reshape(B, G, H // G, T, K)
    return jnp.moveaxis(attended_BGQTK, 3, 1).reshape(B, T, H, K).astype(query_BTHK.dtype)


def _weighted(logits_BGQS, seen, values_BGSK):
    """softmax(logits) · values: float32 [B, G, Q, K]; the softmax's denominator is a column of the same product."""
    logits_BGQS = jnp.where(seen, logits_BGQS, MASKED)
    # Barriers: libraries that XLA calls (YNNPACK on CPUs) have an exp of their own, and take it with a sum beside it.
    highest_BGQ1 = lax.optimization_barrier(logits_BGQS.max(-1, keepdims=True))
    weight_BGQS = lax.optimization_barrier(jnp.exp(logits_BGQS - highest_BGQ1))
    ones_BGS1 = jnp.ones((*values_BGSK.shape[:-1], 1), jnp.float32)
    sums_BGQk = product(weight_BGQS, jnp.concatenate([values_BGSK, ones_BGS1], axis=-1))
    return sums_BGQk[..., :-1] / sums_BGQk[..., -1:]

"""Cache attention in plain XLA: every shape, every platform."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_attention.tensor import KVArrays

MASKED = -1e30  # far below any logit, and finite: a softmax over it alone is no NaN
QUERY_BLOCK = 512  # queries a block of prefill attention: logits of a block, not of the whole prompt, are in memory


def unsupported(shape, chip: str) -> str | None:
    """None: runs everything."""
    del shape, chip
    return None


def quantize(x_BTGK, keep_apart=lambda arrays: arrays):
    """Rounds each token and head to 8 bits: (uint8 [..., K], float16 scale [...], float16 minimum [...]).

    scale = (max − min) / 255; scale and minimum are rounded to float16 first, so that u = round((x − min) / scale)
    makes up for their rounding.
    """
    x_BTGK = x_BTGK.astype(jnp.float32)
    low, high = keep_apart((x_BTGK.min(-1), x_BTGK.max(-1)))
    minimum = low.astype(jnp.float16)
    scale = ((high - low) / 255.0).astype(jnp.float16)
    step = scale.astype(jnp.float32)[..., None]
    offset_BTGK = x_BTGK - minimum.astype(jnp.float32)[..., None]
    units_BTGK = jnp.where(step > 0, jnp.round(offset_BTGK / jnp.where(step > 0, step, 1.0)), 0.0)
    return jnp.clip(units_BTGK, 0, 255).astype(jnp.uint8), scale, minimum


def append(
    kv: KVArrays, layer, key_BTGK, value_BTGK, start_B, share: bool = False, keep_apart=lambda arrays: arrays
) -> KVArrays:
    """Writes T tokens of one layer; see `op.append`. `keep_apart`: what stands between a row's ends and their use."""

    def write(array, new_BTG):
        new_BGT = jnp.swapaxes(new_BTG, 1, 2)
        if array.dtype == jnp.int16:  # float16 as bits, see `KVArrays`
            new_BGT = lax.bitcast_convert_type(new_BGT, jnp.int16)
        new_BGT = new_BGT.astype(array.dtype)
        tail = (0,) * (array.ndim - 4)
        for slot in range(new_BGT.shape[0]):  # one in-place update a slot; a scatter over slots is slower on CPU
            update, place = new_BGT[None, slot : slot + 1], (layer, slot, 0, start_B[slot], *tail)
            if share:  # what is there is written again
                old = lax.dynamic_slice(array, place, update.shape)
                update = jnp.where(start_B[slot] < 0, old, update)
            array = lax.dynamic_update_slice(array, update, place)
        return array

    if not kv.quantized:
        return KVArrays(write(kv.keys, key_BTGK), write(kv.values, value_BTGK))
    keys, key_scales, key_minimums = quantize(key_BTGK, keep_apart)
    values, value_scales, value_minimums = quantize(value_BTGK, keep_apart)
    return KVArrays(
        write(kv.keys, keys),
        write(kv.values, values),
        write(kv.key_scales, key_scales),
        write(kv.key_minimums, key_minimums),
        write(kv.value_scales, value_scales),
        write(kv.value_minimums, value_minimums),
    )


def read_layer(array, layer, length: int):
    """float32 [B, G, length, …]: one layer's first positions of an array of the cache."""
    sizes = (1, *array.shape[1:3], length, *array.shape[4:])
    part = lax.dynamic_slice(array, (layer, *(0,) * (array.ndim - 1)), sizes)
    if array.dtype == jnp.int16:  # float16 as bits, see `KVArrays`
        part = lax.bitcast_convert_type(part, jnp.float16)
    return part[0].astype(jnp.float32)


def attend_decode(
    query_BHK,
    kv,
    layer,
    lengths_B,
    *,
    scale,
    key_bias_GK,
    key_rotary,
    sliding_window,
    active_length,
    share: bool = False,
):
    """One new token a slot over the cache; see `op.attend_decode`."""
    B, H, K = query_BHK.shape
    G = kv.keys.shape[2]
    S = min(active_length or kv.keys.shape[3], kv.keys.shape[3])

    read = functools.partial(read_layer, layer=layer, length=S)
    query_BGQK = query_BHK.astype(jnp.float32).reshape(B, G, H // G, K) * scale
    logits_BGQS = jnp.einsum("BGQK,BGSK->BGQS", query_BGQK, read(kv.keys))
    if kv.quantized:
        sum_BGQ1 = query_BGQK.sum(-1, keepdims=True)
        logits_BGQS = logits_BGQS * read(kv.key_scales)[:, :, None] + sum_BGQ1 * read(kv.key_minimums)[:, :, None]
        if key_bias_GK is not None:
            logits_BGQS = logits_BGQS + _bias_logits(query_BGQK, key_bias_GK, key_rotary, S)
    position_S = jnp.arange(S)
    seen_BS = position_S < lengths_B[:, None]
    if sliding_window is not None:
        seen_BS &= position_S >= lengths_B[:, None] - sliding_window
    logits_BGQS = jnp.where(seen_BS[:, None, None], logits_BGQS, MASKED)
    highest_BGQ1 = logits_BGQS.max(-1, keepdims=True)
    weight_BGQS = jnp.exp(logits_BGQS - highest_BGQ1)
    total_BGQ1 = weight_BGQS.sum(-1, keepdims=True)
    if kv.quantized:
        offset_BGQ1 = (weight_BGQS * read(kv.value_minimums)[:, :, None]).sum(-1, keepdims=True)
        scaled_BGQS = weight_BGQS * read(kv.value_scales)[:, :, None]
        attended_BGQK = jnp.einsum("BGQS,BGSK->BGQK", scaled_BGQS, read(kv.values)) + offset_BGQ1
    else:
        attended_BGQK = jnp.einsum("BGQS,BGSK->BGQK", weight_BGQS, read(kv.values))
    attended_BHK = (attended_BGQK / total_BGQ1).reshape(B, H, K)
    if share:
        return attended_BHK, (highest_BGQ1 + jnp.log(total_BGQ1)).reshape(B, H)
    return attended_BHK.astype(query_BHK.dtype)


def _bias_logits(query_BGQK, key_bias_GK, key_rotary, length: int):
    """q · R_p b for every position p; see `op.attend_decode`."""
    cos_BSK, sin_BSK = (table[:, :length] for table in key_rotary)
    first, second = jnp.split(query_BGQK, 2, axis=-1)
    bias_first, bias_second = jnp.split(key_bias_GK.astype(jnp.float32)[None, :, None], 2, axis=-1)
    with_cos = first * bias_first + second * bias_second
    with_sin = second * bias_first - first * bias_second
    B = query_BGQK.shape[0]
    tables_BSK = jnp.broadcast_to(jnp.concatenate([cos_BSK, sin_BSK], -1), (B, length, query_BGQK.shape[-1]))
    return jnp.einsum("BGQK,BSK->BGQS", jnp.concatenate([with_cos, with_sin], -1), tables_BSK)


def attend_prefill(query_BTHK, key_BTGK, value_BTGK, lengths_B, *, scale, sliding_window):
    """Causal attention within a prompt; see `op.attend_prefill`."""
    B, T, H, K = query_BTHK.shape
    G = key_BTGK.shape[2]
    if jax.default_backend() == "gpu" and query_BTHK.dtype in (jnp.bfloat16, jnp.float16) and K % 8 == 0:
        window = None if sliding_window is None else (sliding_window - 1, 0)
        return jax.nn.dot_product_attention(
            query_BTHK,
            key_BTGK,
            value_BTGK,
            scale=scale,
            is_causal=True,
            local_window_size=window,
            query_seq_lengths=lengths_B,
            key_value_seq_lengths=lengths_B,
            implementation="cudnn",
        )
    query_BTGQK = (query_BTHK.astype(jnp.float32) * scale).reshape(B, T, G, H // G, K)
    key_BTGK, value_BTGK = key_BTGK.astype(jnp.float32), value_BTGK.astype(jnp.float32)
    position_S = jnp.arange(T)

    def block(query_BtGQK, position_t):
        logits_BGQtS = jnp.einsum("BTGQK,BSGK->BGQTS", query_BtGQK, key_BTGK)
        seen_tS = position_S <= position_t[:, None]
        if sliding_window is not None:
            seen_tS &= position_S > position_t[:, None] - sliding_window
        weight_BGQtS = jax.nn.softmax(jnp.where(seen_tS, logits_BGQtS, MASKED), axis=-1)
        return jnp.einsum("BGQTS,BSGK->BTGQK", weight_BGQtS, value_BTGK)

    if T <= QUERY_BLOCK or T % QUERY_BLOCK:
        attended = block(query_BTGQK, position_S)
    else:
        blocks = T // QUERY_BLOCK
        parts = jnp.moveaxis(query_BTGQK.reshape(B, blocks, QUERY_BLOCK, G, H // G, K), 1, 0)
        attended = lax.map(lambda args: block(*args), (parts, position_S.reshape(blocks, QUERY_BLOCK)))
        attended = jnp.moveaxis(attended, 0, 1)
    return attended.reshape(B, T, H, K).astype(query_BTHK.dtype)

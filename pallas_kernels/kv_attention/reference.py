"""Cache attention in NumPy float64: what every kernel is compared with.

Written for clarity: it dequantizes, rotates and softmaxes the textbook way, and shares no code with the kernels.
"""

import dataclasses

import numpy as np

from pallas_kernels.kv_attention.tensor import KVArrays


def rotary_tables(positions, inverse_frequencies, attention_factor=1.0):
    """cos and sin of position · frequency, times attention_factor, both [..., P, K/2] float64.

    Args:
        positions: [P].
        inverse_frequencies: [..., K/2].
        attention_factor: YaRN's factor on the tables; 1 otherwise.
    """
    angles = np.asarray(positions, np.float64)[:, None] * np.asarray(inverse_frequencies, np.float64)[..., None, :]
    return np.cos(angles) * attention_factor, np.sin(angles) * attention_factor


def rotate(x, cos, sin):
    """Rotates the pairs (i, i + K/2) of x's last axis by the tables' angles; tables broadcast against the pairs."""
    first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def quantize(x):
    """Rounds the last axis of x to 8 bits: (uint8 units, float16 scale, float16 minimum), x ≈ minimum + scale · units.

    scale = (max − min) / 255; scale and minimum are rounded to float16 first and the units computed with what was
    rounded, in float32 as the kernels do, ties to even. A range of zero gives units of 0.
    """
    x = np.asarray(x, np.float32)
    low, high = x.min(-1), x.max(-1)
    minimum = low.astype(np.float16)
    scale = ((high - low) / np.float32(255)).astype(np.float16)
    step = scale.astype(np.float32)[..., None]
    offset = x - minimum.astype(np.float32)[..., None]
    units = np.where(step > 0, np.round(offset / np.where(step > 0, step, 1)), 0)
    return np.clip(units, 0, 255).astype(np.uint8), scale, minimum


def dequantize(units, scale, minimum):
    """Minimum + scale · units, float64."""
    minimum, scale = np.asarray(minimum, np.float64), np.asarray(scale, np.float64)
    return minimum[..., None] + scale[..., None] * np.asarray(units, np.float64)


def append(kv: KVArrays, layer, key_BTGK, value_BTGK, start_B) -> KVArrays:
    """A copy of the cache with T tokens of one layer written at start..start + T − 1 of each slot."""
    arrays = {
        field.name: None if getattr(kv, field.name) is None else np.array(getattr(kv, field.name))
        for field in dataclasses.fields(kv)
    }
    for kind, new_BTGK in (("key", key_BTGK), ("value", value_BTGK)):
        parts = {f"{kind}s": np.asarray(new_BTGK)}
        if kv.quantized:
            units, scale, minimum = quantize(np.asarray(new_BTGK, np.float32))
            parts = {f"{kind}s": units, f"{kind}_scales": scale, f"{kind}_minimums": minimum}
        for name, part in parts.items():
            array = arrays[name]
            assert array is not None
            for slot, start in enumerate(np.asarray(start_B)):
                for token in range(part.shape[1]):
                    array[layer, slot, :, start + token] = part[slot, token].astype(array.dtype)
    return KVArrays(**arrays)


def rotate_append(
    qkv_BX, kv: KVArrays, layer, start_B, *, heads, rotary, logn_B=None, stack_layer=None, query_norm_LK=None,
    key_norm_LK=None, epsilon=0.0, key_bias_LX=None,
):  # fmt: skip
    """(queries [B, H, K], a copy of the cache) of one new token a slot; arguments as of `op.rotate_append`.

    In float32 and rounded to the dtype of qkv_BX after each step: equal bit for bit where a norm's sum is exact.
    """
    dtype, (_, B, G, S, K) = np.asarray(qkv_BX).dtype, kv.keys.shape
    stack_layer = layer if stack_layer is None else stack_layer
    query, key, value = np.split(np.asarray(qkv_BX).reshape(B, -1, K), [heads, heads + G], axis=1)

    def rounded(x):
        return np.asarray(x, np.float32).astype(dtype).astype(np.float32)

    def normed(x, scale_LK):
        x = x.astype(np.float32)
        if scale_LK is None:
            return x
        mean = (x * x).sum(-1, dtype=np.float32, keepdims=True) / np.float32(K)
        inverse = np.float32(1) / np.sqrt(mean + np.float32(epsilon))
        return rounded(x * inverse * np.asarray(scale_LK[stack_layer], np.float32))

    def turned(x):
        cos, sin = (np.asarray(table, np.float32).reshape(-1, 1, K // 2) for table in rotary)
        first, second = np.split(x, 2, axis=-1)
        return rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))

    query, key = turned(normed(query, query_norm_LK)), normed(key, key_norm_LK)
    if logn_B is not None:
        query = query * rounded(logn_B)[:, None, None]
    if key_bias_LX is not None and not kv.quantized:
        key = rounded(key + rounded(np.asarray(key_bias_LX[stack_layer]).reshape(G, K)))
    start_B = np.asarray(start_B)
    fits = (start_B >= 0) & (start_B < S)
    new = append(kv, layer, turned(key)[:, None], value[:, None], np.where(fits, start_B, 0))
    names = [field.name for field in dataclasses.fields(kv) if getattr(kv, field.name) is not None]
    for name in names:
        getattr(new, name)[:, ~fits] = np.asarray(getattr(kv, name))[:, ~fits]
    return query.astype(dtype), new


def cached_keys(kv: KVArrays, layer, key_bias_GK=None, key_rotary=None):
    """The layer's keys as attention sees them, [B, G, S, K] float64: dequantized, the rotated bias added back."""
    if not kv.quantized:
        return np.asarray(kv.keys[layer], np.float64)
    keys_BGSK = dequantize(kv.keys[layer], kv.key_scales[layer], kv.key_minimums[layer])
    if key_bias_GK is None or key_rotary is None:
        return keys_BGSK
    cos, sin = (np.asarray(table, np.float64)[:, None] for table in key_rotary)  # [B or 1, 1, S, K/2]
    return keys_BGSK + rotate(np.asarray(key_bias_GK, np.float64)[None, :, None], cos, sin)


def cached_values(kv: KVArrays, layer):
    """The layer's values, [B, G, S, K] float64."""
    if not kv.quantized:
        return np.asarray(kv.values[layer], np.float64)
    return dequantize(kv.values[layer], kv.value_scales[layer], kv.value_minimums[layer])


def attend_decode(
    query_BHK, kv: KVArrays, layer, lengths_B, *, scale, key_bias_GK=None, key_rotary=None, sliding_window=None
):
    """Attention of one new token a slot, [B, H, K] float64; arguments as in `op.attend_decode`."""
    query_BHK = np.asarray(query_BHK, np.float64)
    keys_BGSK = cached_keys(kv, layer, key_bias_GK, key_rotary)
    values_BGSK = cached_values(kv, layer)
    B, H, K = query_BHK.shape
    share = H // keys_BGSK.shape[1]
    attended_BHK = np.zeros((B, H, K))
    for slot, length in enumerate(np.asarray(lengths_B)):
        first = 0 if sliding_window is None else max(0, length - sliding_window)
        for head in range(H):
            logits_S = keys_BGSK[slot, head // share, first:length] @ query_BHK[slot, head] * scale
            weight_S = np.exp(logits_S - logits_S.max())
            attended_BHK[slot, head] = weight_S @ values_BGSK[slot, head // share, first:length] / weight_S.sum()
    return attended_BHK

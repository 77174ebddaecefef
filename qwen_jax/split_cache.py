"""Cache attention where the cache's length is split over a mesh axis: for use under `jax.shard_map`.

Position p of a slot lies on device p mod n of the axis' n, at place p // n, so that all hold as many tokens, however
long the slot is. Every device of the axis has the same queries and new tokens; it writes those that are its own and
attends to its share, and the results are merged by the logarithms of their softmax's denominators. With `axis` None all
is one device's, and nothing is added.
"""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels import kv_attention
from pallas_kernels.kv_attention import KVArrays


def positions(axis: str | None, places: int):
    """int32 [S]: the positions of this device's share of S places."""
    places_S = jnp.arange(places)
    return places_S if axis is None else places_S * lax.axis_size(axis) + lax.axis_index(axis)


def append(kv: KVArrays, layer, key_BTGK, value_BTGK, start_B, *, axis: str | None, heads: int, kernels: str):
    """As `kv_attention.append`; several tokens a row are a prompt, which begins at position 0."""
    if axis is None:
        return kv_attention.append(kv, layer, key_BTGK, value_BTGK, start_B, heads=heads, kernels=kernels)
    n, mine, T = lax.axis_size(axis), lax.axis_index(axis), key_BTGK.shape[1]
    if T == 1:
        place_B = jnp.where(start_B % n == mine, start_B // n, -1)
    else:

        def own(new_BTGK):
            new_BTGK = jnp.pad(new_BTGK, ((0, 0), (0, -T % n), (0, 0), (0, 0)))
            B, _, G, K = new_BTGK.shape
            return lax.dynamic_index_in_dim(new_BTGK.reshape(B, -1, n, G, K), mine, 2, keepdims=False)

        key_BTGK, value_BTGK, place_B = own(key_BTGK), own(value_BTGK), jnp.zeros_like(start_B)
    write = functools.partial(kv_attention.append, heads=heads, kernels=kernels, share=True)
    return write(kv, layer, key_BTGK, value_BTGK, place_B)


def attend_decode(
    query_BHK,
    kv: KVArrays,
    layer,
    lengths_B,
    *,
    axis: str | None,
    sliding_window: int | None = None,
    active_length: int | None = None,
    **options,
):
    """As `kv_attention.attend_decode`; key_rotary is of this device's `positions`."""
    if axis is None:
        more = dict(sliding_window=sliding_window, active_length=active_length)
        return kv_attention.attend_decode(query_BHK, kv, layer, lengths_B, **more, **options)
    n, mine = lax.axis_size(axis), lax.axis_index(axis)

    def places(length_B):  # of this share below a position: p = place · n + mine < length
        return jnp.maximum((length_B - mine + n - 1) // n, 0)

    local_B, window_B1 = places(lengths_B), None
    if sliding_window is not None:
        window_B1 = (local_B - places(lengths_B - sliding_window))[:, None]
    if active_length is not None:
        active_length = -(-active_length // n)
    more = dict(sliding_window=window_B1, active_length=active_length, share=True)
    attended_BHK, log_total_BH = kv_attention.attend_decode(query_BHK, kv, layer, local_B, **more, **options)
    # One gather, merged in the same order everywhere, so that all devices go on with the same numbers.
    both_BHk = jnp.concatenate([attended_BHK, log_total_BH[..., None]], axis=-1)
    attended_NBHK, log_total_NBH1 = jnp.split(lax.all_gather(both_BHk, axis), [query_BHK.shape[-1]], axis=-1)
    weight_NBH1 = jnp.exp(log_total_NBH1 - log_total_NBH1.max(0))
    merged_BHK = (weight_NBH1 * attended_NBHK).sum(0) / weight_NBH1.sum(0)
    return merged_BHK.astype(query_BHK.dtype)

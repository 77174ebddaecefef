"""What kernels need for a share of a cache that is split along its length: tables that start elsewhere, and merging."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_attention.xla import MASKED


def turned_back(cos, sin, rows: int):
    """(cos, sin, factor): the first rows of rotary tables turned back by the angle of row 0, [slots, rows, K/2].

    Rows are as far from one another as in the tables; they keep the tables' factor (YaRN's), [slots, 1, K/2].
    """
    first_cos, first_sin = cos[:, :1], sin[:, :1]
    factor = jnp.sqrt(first_cos * first_cos + first_sin * first_sin)
    first_cos, first_sin = first_cos / factor, first_sin / factor
    cos, sin = cos[:, :rows], sin[:, :rows]
    return cos * first_cos + sin * first_sin, sin * first_cos - cos * first_sin, factor


def hide_empty(attended_BHK, log_total_BH, lengths_B):
    """Nothing (0, and a logarithm that weighs nothing) for slots of which nothing lies in the share."""
    empty_B1 = (lengths_B <= 0)[:, None]
    return jnp.where(empty_B1[..., None], 0.0, attended_BHK), jnp.where(empty_B1, MASKED, log_total_BH)


def merge_slices(schedule, lengths_B, partial, top, total):
    """The slices that a GPU's blocks left of each item (slot and key/value head): attended and log of the denominator.

    Sums are products with a matrix of zeros and ones, in the same order every time.

    Args:
        schedule: `mosaic_gpu_schedule.Schedule`.
        lengths_B: int32, as the kernel had them.
        partial: float32 [J, share, K], Σ w·v of block w and item i at j = w + i; places in between hold anything.
        top: float32 [J, share], the logarithm that the weights refer to: w = e^(logit − top).
        total: float32 [J, share], Σ w.

    Returns:
        float32 [items, share, K] and [items, share].
    """
    tiles_B, _ = schedule.tiles_of(lengths_B, jnp.arange(schedule.slots))
    tiles_I = jnp.repeat(tiles_B, schedule.kv_heads)
    stop_I, item_I = jnp.cumsum(tiles_I), jnp.arange(len(tiles_I))
    count = stop_I[-1]
    first_I = schedule.worker_of(stop_I - tiles_I, count) + item_I
    last_I = schedule.worker_of(stop_I - 1, count) + item_I
    place_J = jnp.arange(len(partial))
    mine_IJ = (place_J >= first_I[:, None]) & (place_J <= last_I[:, None])
    used_J1 = mine_IJ.any(0)[:, None]
    top = jnp.where(used_J1, top, MASKED)
    highest_IQ = jnp.where(mine_IJ[..., None], top, MASKED).max(1)
    add = lambda array: lax.dot_general(  # noqa: E731
        mine_IJ.astype(jnp.float32), array, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    owner_J = jnp.argmax(mine_IJ, axis=0)
    ratio_JQ = jnp.where(used_J1, jnp.exp(top - highest_IQ[owner_J]), 0.0)
    total_IQ = add(ratio_JQ * jnp.where(used_J1, total, 0.0))
    value_IQK = add(ratio_JQ[..., None] * jnp.where(used_J1[..., None], partial, 0.0))
    return value_IQK / total_IQ[..., None], highest_IQ + jnp.log(total_IQ)

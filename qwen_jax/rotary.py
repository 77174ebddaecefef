"""Rotary position embedding in the half-split convention, with YaRN, Qwen v1's dynamic NTK and log-n scaling.

Pair i of a head is channels i and i + K/2, turned by angle position · inverse_frequency[i].
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.exact_sums import turn
from qwen_jax.config import ModelConfig


class Rotary(NamedTuple):
    """What attention needs to turn queries and keys, and to turn a key bias by the keys' own positions.

    Attributes:
        cos_BTK: float32 [B, T, K/2] (B may be 1), of the new tokens' positions; YaRN's attention factor multiplied in.
        sin_BTK: likewise.
        inverse_frequency_BK: float32 [B, K/2] (B may be 1).
        logn_BT: float32 [B, T], the factor of each query; None where the model has no log-n scaling.
    """

    cos_BTK: jax.Array
    sin_BTK: jax.Array
    inverse_frequency_BK: jax.Array
    logn_BT: jax.Array | None


def attention_factor(config: ModelConfig) -> float:
    """YaRN's factor on cos and sin, 0.1·ln(factor) + 1 unless the checkpoint sets it; 1 without YaRN."""
    return 1.0 if config.yarn is None else config.yarn.attention_factor


def dynamic_ntk_alpha(lengths_B, seq_length: int):
    """Qwen v1's stretch of the rotary base: max(2^ceil(log2(length / seq_length) + 1) − 1, 1), float32 [B].

    It is chosen by the prompt's length at prefill and kept while decoding, as in Qwen's modeling_qwen.py.
    """
    # Counted in integers: a float32 log2 of an exact power of two may round up and double the stretch.
    zero = jnp.zeros((), jnp.int32)
    doublings_B = sum(((lengths_B > seq_length * 2**power).astype(jnp.int32) for power in range(16)), zero)
    return jnp.exp2(doublings_B.astype(jnp.float32) + 1.0) - 1.0


def inverse_frequency(config: ModelConfig, ntk_alpha_B=None):
    """Angles per position: theta^(−2i/K), float32 [B, K/2], B = 1 unless `ntk_alpha_B` stretches each row's base.

    YaRN (arXiv:2309.00071): frequencies turning fewer than beta_slow times in the original context are divided by
    `factor`, those turning more than beta_fast times kept, those between blended linearly.
    """
    head_dim = config.head_dim
    exponent_K = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    if ntk_alpha_B is not None:
        base_B = config.rope_theta * ntk_alpha_B ** (head_dim / (head_dim - 2))
        return jnp.exp(-jnp.log(base_B)[:, None] * jnp.asarray(exponent_K, jnp.float32))
    frequency_K = config.rope_theta**-exponent_K
    if config.yarn is not None:
        frequency_K = _yarn(frequency_K, config)
    return jnp.asarray(frequency_K[None], jnp.float32)


def _yarn(frequency_K: np.ndarray, config: ModelConfig) -> np.ndarray:
    yarn, head_dim = config.yarn, config.head_dim
    assert yarn is not None

    def pair_that_turns(times):
        wavelengths = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as the paper's code: no division by zero
    slowed_K = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return frequency_K * (1 - slowed_K) + frequency_K / yarn.factor * slowed_K


def rotary(config: ModelConfig, positions_BT, ntk_alpha_B=None) -> Rotary:
    """The tables of a forward pass; `positions_BT` int32 [B, T], `ntk_alpha_B` from `dynamic_ntk_alpha` or None."""
    frequency_BK = inverse_frequency(config, ntk_alpha_B)
    angle_BTK = positions_BT[:, :, None].astype(jnp.float32) * frequency_BK[:, None, :]
    factor = attention_factor(config)
    logn_BT = logn(config, positions_BT)
    return Rotary(jnp.cos(angle_BTK) * factor, jnp.sin(angle_BTK) * factor, frequency_BK, logn_BT)


def logn(config: ModelConfig, positions):
    """Factor of the queries at int32 positions, float32: log_{seq_length}(p + 1) beyond the trained length, else 1.

    None where the model has no log-n scaling.
    """
    if not config.use_logn_attention:
        return None
    count = (positions + 1).astype(jnp.float32)
    return jnp.where(count > config.seq_length, jnp.log(count) / math.log(config.seq_length), 1.0)


def rotate(x_BTHK, tables: Rotary, exact: bool = False):
    """Turns the pairs of every head by its position, computed in float32 and returned in the dtype of x.

    `exact`: by operations of which no compiler makes one, see `exact_sums`.
    """
    cos_BTHK, sin_BTHK = tables.cos_BTK[:, :, None], tables.sin_BTK[:, :, None]
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    if exact:
        turned = turn(first, second, cos_BTHK, sin_BTHK)
    else:
        turned = first * cos_BTHK - second * sin_BTHK, second * cos_BTHK + first * sin_BTHK
    return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)

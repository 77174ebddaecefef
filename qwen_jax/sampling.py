"""Choosing the next token on the device: greedy, or temperature, top-k, top-p, min-p and repetition penalty.

Rows never influence each other: each has its own settings and its own random numbers, drawn from its seed and the
count of tokens it has produced, so a row of a batch gets what it would get alone.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen; the names and meanings of transformers' generation config.

    Attributes:
        do_sample: draw from the distribution; else take the most probable token.
        temperature: divides the logits, > 0.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities reach p, in (0, 1].
        min_p: keep tokens at least this share as probable as the best, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before, > 0 (1: none).
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        checks = {
            "temperature": (self.temperature > 0, "a number above 0 (for greedy decoding give do_sample=False)"),
            "top_k": (self.top_k >= 0 and int(self.top_k) == self.top_k, "an integer ≥ 0 (0 keeps all tokens)"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "a number above 0 (1 for none)"),
        }
        for name, (valid, expected) in checks.items():
            value = getattr(self, name)
            if not (valid and np.isfinite(value)):
                raise ValueError(f"{name}={value!r}: expected {expected}.")


class Sampler(NamedTuple):
    """`SamplingConfig` as device values: which filters run is static, their numbers are not.

    Attributes:
        seed_B: uint32 [B].
        temperature: float32 scalar, as top_p, min_p and repetition_penalty; top_k int32.
    """

    seed_B: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any


class Filters(NamedTuple):
    """The static half: what has to be compiled."""

    do_sample: bool
    top_k: bool
    top_p: bool
    min_p: bool
    repetition_penalty: bool


def device_sampler(config: SamplingConfig, seed_B: np.ndarray) -> tuple[Sampler, Filters]:
    """Splits a config into traced numbers and static choices."""
    numbers = Sampler(
        np.asarray(seed_B, np.uint32),
        np.float32(config.temperature),
        np.int32(config.top_k),
        np.float32(config.top_p),
        np.float32(config.min_p),
        np.float32(config.repetition_penalty),
    )
    sampling = config.do_sample
    filters = Filters(
        sampling,
        sampling and config.top_k > 0,
        sampling and config.top_p < 1,
        sampling and config.min_p > 0,
        config.repetition_penalty != 1,
    )
    return numbers, filters


def sample(logits_BV, seen_BV, step_B, sampler: Sampler, filters: Filters):
    """The next token of each row, int32 [B].

    Args:
        logits_BV: float32.
        seen_BV: bool, tokens of the prompt and the answer so far; None without a repetition penalty.
        step_B: int32, tokens each row has produced.
        sampler: numbers.
        filters: which of them act.
    """
    if filters.repetition_penalty:
        penalised = jnp.where(
            logits_BV > 0, logits_BV / sampler.repetition_penalty, logits_BV * sampler.repetition_penalty
        )
        logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    if not filters.do_sample:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampler.temperature
    if filters.top_k:
        # The largest threshold that at least k tokens reach.
        logits_BV = _keep(logits_BV, lambda kept_BV: kept_BV.sum(-1) >= sampler.top_k)
    if filters.top_p:
        probability_BV = jax.nn.softmax(logits_BV, axis=-1)
        logits_BV = _keep(logits_BV, lambda kept_BV: jnp.where(kept_BV, probability_BV, 0.0).sum(-1) >= sampler.top_p)
    if filters.min_p:
        floor_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(sampler.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)

    def draw(logits_V, seed, step):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), logits_V)

    return jax.vmap(draw)(logits_BV, sampler.seed_B, step_B).astype(jnp.int32)


def _keep(logits_BV, enough):
    """Masks all but the most probable tokens: those at or above the highest threshold for which `enough` holds.

    Bisection over the order of float32 bit patterns, exact after 32 halvings: a sort of 150,000 logits costs several
    times as much on every backend. Tokens tied at the threshold are all kept.
    """
    bits_BV = lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)  # signed integers that sort as the floats do

    def halve(_, bounds):
        low_B, high_B = bounds  # `enough` holds at low, and above high it does not
        middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # mean rounded up, without overflow
        holds_B = enough(order_BV >= middle_B[:, None])
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B - 1)

    low_B = jnp.full(logits_BV.shape[0], -(2**31), jnp.int32)
    threshold_B, _ = lax.fori_loop(0, 32, halve, (low_B, order_BV.max(-1)))
    return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)

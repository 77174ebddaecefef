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

from pallas_kernels.argmax import argmax_and_finite
from pallas_kernels.chip import default_chip


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


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How the last dimension of logits lies: whole, or under `shard_map` with some token ids on each device.

    Attributes:
        axis: the mesh axis, or axes, it is split over; None where it is whole.
        size: V, where it is split.
        width: ids on one device; those beyond V have the lowest finite logit.
    """

    axis: tuple[str, ...] | str | None = None
    size: int = 0
    width: int = 0

    def sum(self, x_BV):
        """Over all tokens."""
        return self.total(x_BV.sum(-1))

    def total(self, x):
        """Of the devices' sums."""
        return x if self.axis is None else lax.psum(x, self.axis)

    def max(self, x_BV):
        """Over all tokens."""
        return x_BV.max(-1) if self.axis is None else lax.pmax(x_BV.max(-1), self.axis)

    def argmax(self, x_BV):
        """(int32 [B], the lowest id among the greatest; bool [B], whether all are finite) of float32 [B, V]."""
        best_B, finite_B = argmax_and_finite(x_BV, default_chip())
        if self.axis is None:
            return best_B, finite_B
        # One small gather for all facts; devices hold ids in ascending order, so the first device wins a tie.
        value_B = jnp.take_along_axis(x_BV, best_B[:, None], axis=1)[:, 0]
        facts = (lax.bitcast_convert_type(value_B, jnp.int32), best_B + self.first(), finite_B.astype(jnp.int32))
        value_NB, id_NB, finite_NB = jnp.moveaxis(lax.all_gather(jnp.stack(facts, axis=-1), self.axis), -1, 0)
        device_B = jnp.argmax(lax.bitcast_convert_type(value_NB, jnp.float32), axis=0)
        return jnp.take_along_axis(id_NB, device_B[None], axis=0)[0], (finite_NB == 1).all(0)

    def first(self):
        """The lowest id of this device."""
        return lax.axis_index(self.axis) * self.width

    def at(self, x_BV, token_B):
        """x[b, token[b]], [B]."""
        if self.axis is None:
            return jnp.take_along_axis(x_BV, token_B[:, None], axis=1)[:, 0]
        local_B = token_B - self.first()
        mine_B = (local_B >= 0) & (local_B < self.width)
        value_B = jnp.take_along_axis(x_BV, jnp.where(mine_B, local_B, 0)[:, None], axis=1)[:, 0]
        return self.total(jnp.where(mine_B, value_B, 0))

    def mark(self, seen_BV, token_B):
        """`seen` with each row's token added."""
        row_B = jnp.arange(token_B.shape[0])
        if self.axis is None:
            return seen_BV.at[row_B, token_B].set(True)
        local_B = token_B - self.first()
        local_B = jnp.where(local_B < 0, self.width, local_B)  # a negative index would count from the end
        return seen_BV.at[row_B, local_B].set(True, mode="drop")

    def draw(self, key, logits_V):
        """Like `jax.random.categorical`, whose numbers for all of V each device draws and takes its own of."""
        if self.axis is None:
            return jax.random.categorical(key, logits_V).astype(jnp.int32)
        noise_V = jnp.pad(jax.random.gumbel(key, (self.size,), jnp.float32), (0, self.width))
        noise_V = lax.dynamic_slice(noise_V, (jnp.minimum(self.first(), self.size),), (self.width,))
        return self.argmax((noise_V + logits_V)[None])[0][0]


WHOLE = Vocabulary()


def sample(logits_BV, seen_BV, step_B, sampler: Sampler, filters: Filters, vocabulary: Vocabulary = WHOLE):
    """(the next token of each row, int32 [B]; whether all its logits are finite, bool [B]).

    Args:
        logits_BV: float32.
        seen_BV: bool, tokens of the prompt and the answer so far; None without a repetition penalty.
        step_B: int32, tokens each row has produced.
        sampler: numbers.
        filters: which of them act.
        vocabulary: whether V is split over devices; then logits and seen are a device's own and the result the same.
    """
    if filters.repetition_penalty:
        penalised = jnp.where(
            logits_BV > 0, logits_BV / sampler.repetition_penalty, logits_BV * sampler.repetition_penalty
        )
        logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    if not filters.do_sample:
        return vocabulary.argmax(logits_BV)
    finite_B = vocabulary.sum(~jnp.isfinite(logits_BV)) == 0
    logits_BV = logits_BV / sampler.temperature
    if filters.top_k:
        # The largest threshold that at least k tokens reach.
        logits_BV = _keep(logits_BV, lambda kept_BV: kept_BV.sum(-1), sampler.top_k, vocabulary)
    if filters.top_p:
        weight_BV = jnp.exp(logits_BV - vocabulary.max(logits_BV)[:, None])
        probability_BV = weight_BV / vocabulary.sum(weight_BV)[:, None]

        def mass(kept_BV):
            return jnp.where(kept_BV, probability_BV, 0.0).sum(-1)

        logits_BV = _keep(logits_BV, mass, sampler.top_p, vocabulary)
    if filters.min_p:
        floor_B1 = vocabulary.max(logits_BV)[:, None] + jnp.log(sampler.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)

    def draw(logits_V, seed, step):
        return vocabulary.draw(jax.random.fold_in(jax.random.key(seed), step), logits_V)

    return jax.vmap(draw)(logits_BV, sampler.seed_B, step_B), finite_B


def _keep(logits_BV, amount, wanted, vocabulary: Vocabulary):
    """Masks all but the most probable tokens: those at or above the highest threshold whose tokens' `amount` suffices.

    A search over the order of float32 bit patterns, exact after all 32 bits: a sort of 150,000 logits costs several
    times as much on every backend. A bit a round; over devices four, for there each round is a reduction that costs
    its latency. Tokens tied at the threshold are all kept.
    """
    bits = 1 if vocabulary.axis is None else 4
    pattern_BV = lax.bitcast_convert_type(logits_BV, jnp.uint32)
    # Unsigned integers that sort as the floats do.
    order_BV = jnp.where(pattern_BV >> 31 == 1, ~pattern_BV, pattern_BV | jnp.uint32(1 << 31))

    def refine(step, threshold_B):
        shift = (32 - bits * (step + 1)).astype(jnp.uint32)
        higher_BJ = [threshold_B | (jnp.uint32(j) << shift) for j in range(1, 2**bits)]
        amounts_BJ = jnp.stack([amount(order_BV >= higher_B[:, None]) for higher_B in higher_BJ], axis=-1)
        reached_B = (vocabulary.total(amounts_BJ) >= wanted).sum(-1).astype(jnp.uint32)
        return threshold_B | (reached_B << shift)

    lowest_B = jnp.zeros(logits_BV.shape[0], jnp.uint32)
    threshold_B = lax.fori_loop(0, 32 // bits, refine, lowest_B)
    return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)

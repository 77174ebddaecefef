"""Sampling against a sort-based NumPy float64 reference, and its independence of the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.sampling import SamplingConfig, device_sampler, sample


def reference_support(logits, config):
    """Tokens that may be drawn, by transformers' rules: temperature, top-k, top-p, min-p in turn."""
    logits = np.asarray(logits, np.float64) / config.temperature
    order = np.argsort(-logits, kind="stable")
    kept = order[: config.top_k] if config.top_k else order
    probability = np.exp(logits[kept] - logits[kept].max())
    probability /= probability.sum()
    enough = int(np.searchsorted(np.cumsum(probability), config.top_p - 1e-6)) + 1
    kept = kept[:enough]
    best = logits[kept].max()
    return {int(token) for token in kept if logits[token] >= best + np.log(max(config.min_p, 1e-300)) - 1e-6}


def draw(logits, config, seeds, steps):
    B = len(seeds)
    numbers, filters = device_sampler(config, np.asarray(seeds))
    return np.asarray(
        sample(np.tile(np.float32(logits), (B, 1)), None, np.asarray(steps, np.int32), numbers, filters)[0]
    )


@given(
    st.integers(0, 99),
    st.sampled_from([0, 1, 3, 20, 500]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([0, 0.2]),
)
@settings(max_examples=25, deadline=None)
def test_draws_come_from_the_right_set(seed, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=60) * 2
    config = SamplingConfig(True, 0.7, top_k, top_p, min_p)
    drawn = draw(logits, config, np.arange(300), np.zeros(300))
    support = reference_support(logits, config)
    assert set(drawn.tolist()) <= support
    if len(support) <= 4:
        assert set(drawn.tolist()) == support


def test_frequencies_follow_the_distribution():
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    drawn = draw(logits, SamplingConfig(True), np.arange(4000), np.zeros(4000))
    assert np.abs(np.bincount(drawn) / 4000 - [0.5, 0.25, 0.125, 0.125]).max() < 0.03


def test_a_row_is_independent_of_its_batch():
    logits = np.random.default_rng(0).normal(size=50)
    alone = draw(logits, SamplingConfig(True, top_p=0.9), [7], [3])[0]
    assert (draw(logits, SamplingConfig(True, top_p=0.9), [1, 7, 7], [3, 3, 3])[1:] == alone).all()
    assert len(set(draw(logits, SamplingConfig(True), np.full(20, 7), np.arange(20)).tolist())) > 3


def test_repetition_penalty():
    numbers, filters = device_sampler(SamplingConfig(repetition_penalty=2.0), np.zeros(2))
    logits = np.float32([[3.0, 2.0, -1.0], [-0.5, -0.6, -4.0]])
    seen = np.array([[True, False, False], [True, False, False]])
    np.testing.assert_array_equal(sample(logits, seen, np.zeros(2, np.int32), numbers, filters)[0], [1, 1])
    np.testing.assert_array_equal(sample(logits, ~seen, np.zeros(2, np.int32), numbers, filters)[0], [0, 0])


@pytest.mark.parametrize(
    "name, value",
    [("temperature", 0), ("temperature", float("nan")), ("top_k", -1), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.1),
     ("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0)],
)  # fmt: skip
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}.*expected"):
        SamplingConfig(**{name: value})

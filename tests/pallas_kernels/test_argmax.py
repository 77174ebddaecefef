"""Argmax over a vocabulary against NumPy, ties included, and whether a row is finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.argmax import argmax_and_finite

CHIPS = ["cpu", "NVIDIA H100 80GB HBM3", "TPU v6e"]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("width", [1, 96, 127, 151936], ids="{}wide".format)
def test_argmax(width, chip):
    """Values are few, so that most rows have ties, in one column of runs and across columns."""
    x_BV = np.random.default_rng(width).integers(-3, 3, (4, width)).astype(np.float32)
    x_BV[1] = -np.inf
    x_BV[2] += np.linspace(0, 1, width, dtype=np.float32)
    got_B, finite_B = jax.jit(argmax_and_finite, static_argnums=1)(jnp.asarray(x_BV), chip)
    assert got_B.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got_B), x_BV.argmax(-1))
    np.testing.assert_array_equal(finite_B, [True, False, True, True])


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite(value, chip):
    x_BV = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    x_BV[1, 50] = value
    index_B, finite_B = argmax_and_finite(jnp.asarray(x_BV), chip)
    np.testing.assert_array_equal(finite_B, [True, False])
    assert index_B[0] == x_BV[0].argmax() and 0 <= int(index_B[1]) < 96


@pytest.mark.parametrize("chip", CHIPS)
def test_not_a_number_gives_a_valid_index(chip):
    index_B, _ = argmax_and_finite(jnp.full((1, 96), jnp.nan), chip)
    assert 0 <= int(index_B[0]) < 96

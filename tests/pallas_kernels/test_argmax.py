"""Argmax over a vocabulary against NumPy, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.argmax import argmax


@pytest.mark.parametrize("chip", ["cpu", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("width", [1, 96, 127, 151936], ids="{}wide".format)
def test_argmax(width, chip):
    """Values are few, so that most rows have ties, in one column of runs and across columns."""
    x_BV = np.random.default_rng(width).integers(-3, 3, (4, width)).astype(np.float32)
    x_BV[1] = -np.inf
    x_BV[2] += np.linspace(0, 1, width, dtype=np.float32)
    got_B = jax.jit(argmax, static_argnums=1)(jnp.asarray(x_BV), chip)
    assert got_B.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got_B), x_BV.argmax(-1))


def test_not_a_number_gives_a_valid_index():
    x_BV = jnp.full((1, 96), jnp.nan)
    assert 0 <= int(argmax(x_BV, "cpu")[0]) < 96

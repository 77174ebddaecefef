"""Greedy choice of a token: the argmax over a vocabulary and whether all is finite, where XLA's own forms are slow."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chip import is_gpu

MAX_RUNS = 128  # steps of the written-out program


def argmax_and_finite(x_BV: jax.Array, chip: str) -> tuple[jax.Array, jax.Array]:
    """Of float32 [B, V]: (int32 [B], the lowest index among the greatest; bool [B], whether a row is finite).

    Of a row with NaN any valid index. On a GPU the two are one reduction: as two they read the logits twice and take
    four launches, each with a gap before it.
    """
    B, V = x_BV.shape
    if not is_gpu(chip):
        return _argmax(x_BV, chip), jnp.isfinite(x_BV).all(-1)

    def better(a, b):
        (a_value, a_index, a_finite), (b_value, b_index, b_finite) = a, b
        first = (a_value > b_value) | ((a_value == b_value) & (a_index < b_index))
        return jnp.where(first, a_value, b_value), jnp.where(first, a_index, b_index), a_finite & b_finite

    operands = x_BV, lax.broadcasted_iota(jnp.int32, (B, V), 1), jnp.isfinite(x_BV)
    start = jnp.float32(-jnp.inf), jnp.int32(V), jnp.bool_(True)
    _, index_B, finite_B = lax.reduce(operands, start, better, (1,))
    return jnp.minimum(index_B, V - 1), finite_B


def _argmax(x_BV: jax.Array, chip: str) -> jax.Array:
    """int32 [B].

    On a CPU XLA reduces (value, index) pairs one by one: 0.25 ms for 49152, 3 % of a small model's step. There V is cut
    into runs that are compared element by element, whole vectors at a time: 0.03 ms.
    """
    B, V = x_BV.shape
    runs = next(count for count in range(MAX_RUNS, 0, -1) if V % count == 0)
    if chip != "cpu" or runs < 8:
        return jnp.argmax(x_BV, axis=-1).astype(jnp.int32)
    width = V // runs
    x_BRW = x_BV.reshape(B, runs, width)
    value_BW, run_BW = x_BRW[:, 0], jnp.zeros((B, width), jnp.int32)
    for run in range(1, runs):
        greater_BW = x_BRW[:, run] > value_BW  # strictly: the earlier run keeps a tie
        value_BW = jnp.where(greater_BW, x_BRW[:, run], value_BW)
        run_BW = jnp.where(greater_BW, run, run_BW)
    value_BW, run_BW = lax.optimization_barrier((value_BW, run_BW))
    index_BW = run_BW * width + lax.broadcasted_iota(jnp.int32, (B, width), 1)
    return jnp.where(value_BW == value_BW.max(-1, keepdims=True), index_BW, V - 1).min(-1)

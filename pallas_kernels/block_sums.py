"""Products of a few rows with a packed matrix on a CPU, written so that XLA makes one pass over the packed words.

XLA's own `dot` first writes a float copy of anything that is not float32. Here the matrix [in, out] is viewed as blocks
of at most 64 rows, and every row of a block becomes one written-out term, x · value, of one elementwise program over
[blocks, M, out]: a word is loaded, decoded in registers, multiplied and added, and nothing but the sums of a block
reaches memory. Words are sliced out of the stack of layers inside the terms: indexing a layer first would copy it.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax

MAX_ROWS = 8  # x rows up to which this beats dequantizing a layer for a float32 dot (1: 3.7 times, 8: 1.05)
MAX_BLOCK = 64  # matrix rows a block: terms of the program. 16 to 64 are equally fast, longer ones compile slowly
MIN_BLOCK = 8  # smaller blocks write and read more sums than the words they come from
RUNNING_SUMS = 4  # one sum would wait for its own additions: 1.5 times slower
MAX_SUM_BYTES = 2**26  # of the blocks' sums; x rows go one at a time where all at once would need more


def compiler_options(chip: str) -> dict[str, str]:
    """Options for `jax.jit(compiler_options=)` of a program that holds these sums.

    LLVM uses half of AVX-512's width unless told: 1.13 times slower steps. Without AVX-512 it changes nothing.
    """
    return {"xla_cpu_prefer_vector_width": "512"} if chip == "cpu" else {}


def block_rows(unit: int, *divisible: int) -> int | None:
    """Most rows ≤ `MAX_BLOCK`, a multiple of `unit`, that divide every number in `divisible`; None if below 8."""
    for rows in range(MAX_BLOCK // unit * unit, 0, -unit):
        if rows >= MIN_BLOCK and not any(number % rows for number in divisible):
            return rows
    return None


def block_sums(
    x_MI: jax.Array,
    words,
    layer,
    rows: int,
    block_words: int,
    factors,
    terms: Callable[[Callable[[int], jax.Array]], Iterable[jax.Array]],
    finish: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """float32 [M, out]: Σ over blocks of finish(Σ over the rows of a block of x · factor · value).

    Args:
        x_MI: float32 [M, in].
        words: [*stack, in / rows · block_words, out].
        layer: index into the stack, None without one.
        rows: matrix rows a block.
        block_words: words a block and column.
        factors: float32 [rows] powers of two that x is multiplied by beforehand, so that values may be taken from their
            words unshifted; None for ones.
        terms: given `load(j)`, word j of all blocks [blocks, out], yields the float32 values [blocks, out] of the rows
            of a block, in their order.
        finish: makes of a block's sums [blocks, M, out] and Σ x over its rows [blocks, M, 1] what is summed over the
            blocks; None for the sums as they are.
    """
    M, out = x_MI.shape[0], words.shape[-1]
    blocks = x_MI.shape[1] // rows
    if M > 1 and blocks * M * out * 4 > MAX_SUM_BYTES:
        one = lambda x_I: block_sums(x_I[None], words, layer, rows, block_words, factors, terms, finish)[0]  # noqa: E731
        return lax.map(one, x_MI)
    view = jnp.asarray(words).reshape(*words.shape[:-2], blocks, block_words, out)

    def load(j: int) -> jax.Array:
        if layer is None:
            return view[:, j]
        return lax.dynamic_slice(view, (layer, 0, j, 0), (1, blocks, 1, out)).reshape(blocks, out)

    x_bMr = plain_x_bMr = jnp.swapaxes(x_MI.reshape(M, blocks, rows), 0, 1)
    if factors is not None:
        # The barrier keeps whatever made x (a norm, a gate) out of the long program.
        x_bMr = lax.optimization_barrier(x_bMr * factors)
    sums: list = [None] * RUNNING_SUMS
    for row, value_bO in enumerate(terms(load)):
        term = x_bMr[:, :, row, None] * value_bO[:, None]
        k = row % RUNNING_SUMS
        sums[k] = term if sums[k] is None else sums[k] + term
    total_bMO = (sums[0] + sums[1]) + (sums[2] + sums[3])
    if finish is not None:
        total_bMO = finish(total_bMO, plain_x_bMr.sum(-1, keepdims=True))
    # Without this barrier the sum over blocks is fused with the terms, and takes up to twice as long.
    return lax.optimization_barrier(total_bMO).sum(0)

"""The public op: a residual stream plus the cards' shares of a projection's result, and which shapes it takes."""

import jax
import jax.numpy as jnp

from pallas_kernels.card_sums.exchange import MOST_ROWS
from pallas_kernels.decode_step import MULTIPROCESSORS

MOST_WIDTH = 8192  # a row is at most one block's work, 8 columns a thread
MOST_CARDS = 8


def unsupported(rows: int, width: int, cards: int, dtype: str, chip: str) -> str | None:
    """None, or one sentence why a launch cannot sum [rows, width] over so many cards of a kind."""
    if chip not in MULTIPROCESSORS:
        return f"it is written for {', '.join(MULTIPROCESSORS)}"
    if dtype != "bfloat16":
        return f"it adds bfloat16, not {dtype}"
    if not 0 < rows <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} rows, not {rows}"
    if width % 8 or width > MOST_WIDTH:
        return f"it takes a multiple of 8 columns up to {MOST_WIDTH}, not {width}"
    if not 1 < cards <= MOST_CARDS:
        return f"it takes 2 to {MOST_CARDS} cards, not {cards}"
    return None


def add_sum(share_MD: jax.Array, hidden_MD: jax.Array, addresses: jax.Array, *, chip: str) -> jax.Array:
    """hidden + Σ over the cards of share, [M, D]: under a `shard_map`, by all cards of a group alike.

    The shares are added in float32 in the cards' order; their sum is rounded, added to hidden, and rounded again. All
    cards get the same bits.

    Args:
        share_MD: bfloat16, this card's.
        hidden_MD: bfloat16, the same on all cards.
        addresses: this card's row of `exchange.addresses` of this width.
        chip: `device_kind`; must not be `unsupported`.

    Raises:
        ValueError: the shape is unsupported.
    """
    [hidden_MD] = _call(share_MD, hidden_MD, addresses, chip)
    return hidden_MD


def add_sum_norm(
    share_MD: jax.Array, hidden_MD: jax.Array, scale_LD: jax.Array, layer, addresses: jax.Array, *, epsilon: float,
    chip: str,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(`add_sum`, its rows divided by their root mean square and multiplied by a scale, rounded), both [M, D].

    Args:
        share_MD: see `add_sum`, as hidden_MD, addresses and chip.
        hidden_MD: see share_MD.
        scale_LD: float32, of several layers.
        layer: index, int or int32 scalar.
        addresses: see share_MD.
        epsilon: added to the mean square.
        chip: see share_MD.
    """
    norm = scale_LD, jnp.asarray(layer, jnp.int32).reshape(1)
    hidden_MD, normed_MD = _call(share_MD, hidden_MD, addresses, chip, norm, epsilon)
    return hidden_MD, normed_MD


def _call(share_MD, hidden_MD, addresses, chip: str, norm=(), epsilon: float | None = None):
    from pallas_kernels.card_sums import kernel  # Mosaic GPU takes 0.6 s to import: only where a GPU runs it

    (rows, width), cards = hidden_MD.shape, addresses.size // 2 - 2
    if (reason := unsupported(rows, width, cards, hidden_MD.dtype.name, chip)) is not None:
        raise ValueError(f"card_sums on {chip}: {reason}.")
    return kernel.build(kernel.Plan(rows, width, cards, epsilon))(share_MD, hidden_MD, addresses, *norm)

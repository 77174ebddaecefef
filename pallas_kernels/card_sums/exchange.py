"""The memory where the cards of a process write to each other, and its addresses: a kernel's only way to the others.

It is no argument of a program, for XLA might copy it. A card has an inbox, zeros at first, and copies of the number of
the next reduction, one a block, 1 at first; every kernel leaves all copies one higher.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np

MOST_ROWS = 64
PLACES = 2  # of an inbox, in turn
NUMBERS = 128  # copies, and the most blocks of a kernel


def inbox_shape(cards: int, width: int) -> tuple[int, ...]:
    """int32: place, card that wrote, row, half of a piece of 8 columns, piece, two words (two columns, number)."""
    return PLACES, cards, MOST_ROWS, 2, width // 8, 4


_lock = threading.Lock()  # or two threads make it, and one's goes


@functools.cache
def _memory(devices: tuple[jax.Device, ...], width: int) -> list[tuple[jax.Array, jax.Array]]:
    """Each card's inbox and numbers; kept while the process lives, for any program may hold their addresses."""
    shape = inbox_shape(len(devices), width)
    made = [(jnp.zeros(shape, jnp.int32, device=d), jnp.ones(NUMBERS, jnp.int32, device=d)) for d in devices]
    return jax.block_until_ready(made)  # before another card writes to it


def addresses(devices: tuple[jax.Device, ...], width: int) -> np.ndarray:
    """For each card int32 [2 · (cards + 2)], 64-bit numbers, low halves first.

    Its place among the cards; the addresses of its numbers, of its inbox, and of the others' inboxes, the next card's
    first. Models of one width on the same cards share the memory: a card's kernels run one after another.

    Args:
        devices: the cards, in the order of the sum.
        width: columns of the sums.
    """
    with _lock:
        memory = _memory(devices, width)
    inboxes = [inbox.unsafe_buffer_pointer() for inbox, _ in memory]
    rows = [
        [rank, numbers.unsafe_buffer_pointer(), *inboxes[rank:], *inboxes[:rank]]
        for rank, (_, numbers) in enumerate(memory)
    ]
    return np.array(rows, np.int64).view(np.int32)

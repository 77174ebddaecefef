"""Time of work on a device, the host's share cancelled; and the rate of a copy, the ceiling of memory-bound work."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LEAST_SECONDS = 0.01  # of the difference that is measured: the host's own jitter is a few tenths of a millisecond
TRIES = 4


def seconds(run: Callable[[], Any], few: int = 1, many: int = 4, repeats: int = 7) -> float:
    """Seconds of one `run()`: the median difference of the times of `many` and of `few` calls, over their number.

    Calls are dispatched without waiting, so that gaps between launches and the wait at the end cancel.

    Args:
        run: starts the work and returns its arrays.
        few: calls of the short batch.
        many: calls of the long batch at first; more until the difference is `LEAST_SECONDS` and stands out of its
            own spread.
        repeats: batches of each length.

    Raises:
        RuntimeError: the host was too busy for a time.
    """
    for _ in range(2):
        jax.block_until_ready(run())

    def timed(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            result = run()
        jax.block_until_ready(result)
        return time.perf_counter() - begin

    once = max(timed(many) / many, 1e-7)
    many = max(many, few + math.ceil(LEAST_SECONDS / once))
    tries = 0
    while True:
        differences = sorted(timed(many) - timed(few) for _ in range(repeats))
        middle, spread = statistics.median(differences), differences[-1 - repeats // 4] - differences[repeats // 4]
        tries += 1
        if spread < middle / 10 or tries == TRIES:
            break
        many = few + 2 * (many - few)
    if spread > middle:
        raise RuntimeError(
            f"timing: {many} calls less {few} take {middle * 1e3:.1f} ms, give or take {spread * 1e3:.1f}: the host is "
            "too busy. Measure when nothing else runs."
        )
    return middle / (many - few)


def copy_bandwidth(megabytes: int | None = None) -> float:
    """Bytes read plus bytes written a second by a copy on the device.

    Args:
        megabytes: of the array; default 1024, on a CPU 128.
    """
    cpu = jax.default_backend() == "cpu"
    if megabytes is None:
        megabytes = 128 if cpu else 1024
    source = jnp.arange(megabytes * 2**18, dtype=jnp.int32)
    if not cpu:
        copy = jax.jit(lambda array: array + 1)  # a plain copy may be done by reference
        return 2 * source.nbytes / seconds(lambda: copy(source))
    # In place: the system hands out fresh memory a page at a time, far slower than it is copied.
    copy, array = jax.jit(lambda array: array + 1, donate_argnums=0), jnp.copy(source)

    def once() -> jax.Array:
        nonlocal array
        array = copy(array)
        return array

    return 2 * source.nbytes / seconds(once, repeats=5)

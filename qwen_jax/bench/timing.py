"""Time of work on a device, the host's share cancelled; and the rate of a copy, the ceiling of memory-bound work."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def seconds(run: Callable[[], Any], few: int = 3, many: int = 12, repeats: int = 7) -> float:
    """Seconds of one `run()`: the median time of `many` calls less that of `few`, over the difference.

    Calls are dispatched without waiting, so that gaps between launches and the wait at the end cancel.

    Args:
        run: starts the work and returns its arrays.
        few: calls of the short batch.
        many: calls of the long batch.
        repeats: batches of each length.
    """
    for _ in range(2):
        jax.block_until_ready(run())

    def timed(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            result = run()
        jax.block_until_ready(result)
        return time.perf_counter() - begin

    short, long = ([timed(count) for _ in range(repeats)] for count in (few, many))
    # On a busy machine the short batch may take longer: a microsecond, so that no rounded time is 0.
    return max(statistics.median(long) - statistics.median(short), 1e-6) / (many - few)


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

    return 2 * source.nbytes / seconds(once, 1, 5, 5)

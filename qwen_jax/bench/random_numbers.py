"""What random weights and caches of benchmarks have in common."""

import math

import jax


def scale(inputs: int, bits: int) -> float:
    """Of uniform integers, whose deviation is 2^bits / √12: with it outputs have about the size of inputs."""
    return math.sqrt(12 / inputs) / 2**bits


def by_slot(key, shape: tuple[int, ...], make) -> jax.Array:
    """Random numbers of a cache [layers, rows, …], a row of a layer at a time.

    The generator's own temporaries are four times what it makes.

    Args:
        key: of all of them.
        shape: of the whole.
        make: (key, shape[2:]) to the numbers of one row in one layer.
    """
    slots = jax.lax.map(lambda one: make(one, shape[2:]), jax.random.split(key, shape[0] * shape[1]))
    return slots.reshape(shape)

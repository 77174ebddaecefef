"""What a Mosaic TPU kernel moves between device memory and the chip, counted from its grid and index maps.

The pipeline copies a block when its index differs from the step before; XLA's cost analysis would only repeat what the
kernel says of itself.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def count_bytes(monkeypatch, call, scalars):
    """Bytes that all Pallas calls inside `call()` move, given the values of their prefetched scalars.

    `call` is traced with shapes alone; `scalars` is a list, one NumPy array for each Pallas call, in order.
    """
    calls = []

    def record(body, *, grid_spec, out_shape, **_):
        def run(prefetched, *operands):
            outs = jax.tree.leaves(out_shape)
            out_specs = jax.tree.leaves(grid_spec.out_specs, is_leaf=lambda leaf: isinstance(leaf, pl.BlockSpec))
            pairs = [*zip(grid_spec.in_specs, operands, strict=True), *zip(out_specs, outs, strict=True)]
            calls.append((grid_spec.grid, [(spec, array.shape, array.dtype.itemsize) for spec, array in pairs]))
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out_shape)

        return run

    monkeypatch.setattr(pl, "pallas_call", record)
    jax.eval_shape(call)
    return [
        sum(_bytes_of(*block, grid, jnp.asarray(values, jnp.int32)) for block in blocks)
        for (grid, blocks), values in zip(calls, scalars, strict=True)
    ]


def _bytes_of(spec, shape, itemsize: int, grid, values) -> int:
    sizes = [1 if size is None else size for size in spec.block_shape]
    total, before = 0, None
    for point in itertools.product(*map(range, grid)):
        index = tuple(int(place) for place in spec.index_map(*point, values))
        if index != before:
            blocks = zip(sizes, index, shape, strict=True)
            total += math.prod(min(size, extent - place * size) for size, place, extent in blocks) * itemsize
        before = index
    return total

"""How the TPU kernels cut the rows of a matrix into tiles, and where each tile finds its scales.

A tile is a run of rows that enters the matrix unit at once. Group sizes that divide it, or are divided by it, need
nothing more than an index; for any other size the scales of one layer are gathered, tile by tile, before the call.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of one matrix as tiles.

    Attributes:
        rows: of one tile.
        count: tiles of the matrix, the last one possibly short.
        group_size: rows that share a scale.
        groups: of the matrix.
        slots: groups that meet in one tile, at most.
    """

    rows: int
    count: int
    group_size: int
    groups: int
    slots: int

    @property
    def regular(self) -> bool:
        """Whether slot p of tile t is group t · slots + p, or, with one slot, the group of the tile's first row."""
        return self.groups == 1 or self.group_size % self.rows == 0 or self.rows % self.group_size == 0

    def gather(self) -> np.ndarray:
        """int32 [count · slots]: the group of each slot of each tile, of use where they are not regular."""
        first = np.arange(self.count)[:, None] * self.rows // self.group_size
        return np.minimum(first + np.arange(self.slots), self.groups - 1).reshape(-1).astype(np.int32)

    def group_of(self, tile, slot: int):
        """Row of the scales (gathered ones, if not regular) for a slot of a tile; `tile` may be traced."""
        if self.groups == 1:
            return 0
        if self.regular and self.group_size > self.rows:
            return divide(tile, self.group_size // self.rows)
        row = tile * self.slots + slot
        last = (self.groups if self.regular else self.count * self.slots) - 1
        if self.count * self.slots - 1 <= last:
            return row
        return min(row, last) if isinstance(row, int) else jnp.minimum(row, last)


def divide(number, divisor: int):
    """The quotient, rounded down, of a number that is not negative; traced ones without `//`, which looks at signs."""
    return number // divisor if isinstance(number, int) else lax.div(number, jnp.int32(divisor))


@functools.cache
def tiles(in_features: int, group_size: int, rows: int) -> Tiles:
    """The tiles of a matrix, `rows` each."""
    count, groups = -(-in_features // rows), -(-in_features // group_size)
    start = np.arange(count) * rows
    end = np.minimum(start + rows, in_features) - 1
    slots = int((end // group_size - start // group_size).max()) + 1
    if rows % group_size == 0:  # also in a short last tile the others' scheme
        slots = rows // group_size
    return Tiles(rows, count, group_size, groups, 1 if groups == 1 else slots)

"""Which cards share a model's layers, and the memory where they write to each other (see `cards`)."""

import dataclasses

import jax
from jax import lax

from pallas_kernels.decode_step.plan import Plan

PLACES = 2  # reductions of a layer, one place each


def inbox_shape(plan: Plan) -> tuple[int, ...]:
    """int32: place, card that wrote, row, column, (value, number)."""
    return PLACES, plan.cards, plan.batch, plan.hidden, 2


@dataclasses.dataclass(frozen=True)
class Group:
    """Where the cards of a sum lie in the mesh of a `shard_map`.

    Attributes:
        axis: name of the mesh axis that they lie on.
        mesh: (name, size) of all its axes, in their order.
    """

    axis: str
    mesh: tuple[tuple[str, int], ...]

    @classmethod
    def here(cls, axis: str) -> "Group":
        """Under a `shard_map`."""
        mesh = jax.sharding.get_abstract_mesh()
        return cls(axis, tuple(mesh.shape.items()))

    @property
    def size(self) -> int:
        return dict(self.mesh)[self.axis]

    @property
    def stride(self) -> int:
        """From one card of the group to the next, in the numbers of the devices."""
        return self._strides()[self.axis]

    def first(self):
        """The number of the group's first device; int32, traced."""
        strides, total = self._strides(), lax.axis_index(self.axis) * 0
        for name, size in self.mesh:
            if name != self.axis and size > 1:
                total += lax.axis_index(name) * strides[name]
        return total

    def _strides(self) -> dict[str, int]:
        strides, step = {}, 1
        for name, size in reversed(self.mesh):
            strides[name], step = step, step * size
        return strides

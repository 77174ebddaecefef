"""In which order the rows of a matrix are rounded, and how they are cut into groups and blocks."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from qwen_jax.quantize.assembly import Places

if TYPE_CHECKING:
    from qwen_jax.quantize.gptq import MatrixSettings

ORDERS = ("natural", "activation", "group_aware")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The order of the rows, cut into chunks that share a grid and are padded to whole steps.

    Attributes:
        order_I: rows of the matrix in the order of rounding.
        row_R: the same with −1 where a chunk is padded, [chunks · chunk].
        place_I: where in row_R each of order_I stands.
        chunk: padded rows of a chunk: a group, or with static groups any number of rows.
        step: rows of a block; divides chunk.
        group_C: the group that each chunk is; None where chunks are no groups (static).
        permutation: as in `QuantizedTensor`.
        group_size: true rows of a group.
        groups: their number.
    """

    order_I: np.ndarray
    row_R: np.ndarray
    place_I: np.ndarray
    chunk: int
    step: int
    group_C: np.ndarray | None
    permutation: np.ndarray | None
    group_size: int
    groups: int

    @classmethod
    def make(cls, diagonal_I: np.ndarray, settings: "MatrixSettings", block: int) -> "Plan":
        in_features = len(diagonal_I)
        group_size = in_features if settings.group_size == -1 else min(settings.group_size, in_features)
        groups = -(-in_features // group_size)
        static = settings.static_groups and groups > 1
        natural = [
            np.arange(start, min(start + group_size, in_features)) for start in range(0, in_features, group_size)
        ]
        group_C = np.arange(groups)
        if settings.order == "natural":
            order_I = np.arange(in_features)
        elif settings.order == "activation" or groups == 1:
            order_I = np.argsort(-diagonal_I, kind="stable")
        else:
            group_C = np.argsort([-diagonal_I[rows].max() for rows in natural], kind="stable")
            inner = [natural[group][np.argsort(-diagonal_I[natural[group]], kind="stable")] for group in group_C]
            order_I = np.concatenate(inner)
        rows = min(block, in_features) if static else group_size
        step = -(-rows // -(-rows // block))
        chunk = -(-rows // step) * step
        if static:
            sizes = [min(rows, in_features - start) for start in range(0, in_features, rows)]
        else:
            sizes = [len(natural[group]) for group in group_C]
            if settings.order == "activation":  # groups are formed along the order
                sizes = [len(part) for part in natural]
        row_R = np.full(len(sizes) * chunk, -1)
        starts = np.repeat(np.arange(len(sizes)) * chunk - np.cumsum([0, *sizes[:-1]]), sizes)
        place_I = np.arange(in_features) + starts
        row_R[place_I] = order_I
        moved = settings.order == "activation" and groups > 1 and not static
        permutation = order_I.astype(np.int32) if moved else None
        return cls(order_I, row_R, place_I, chunk, step, None if static else group_C, permutation, group_size, groups)

    @property
    def static(self) -> bool:
        """Whether scales are found before any row is rounded."""
        return self.group_C is None

    def places(self) -> Places:
        """Where the stored rows and groups are."""
        row_I, natural_I = self.place_I, None
        if self.permutation is None:
            row_I = np.empty_like(self.place_I)
            row_I[self.order_I] = self.place_I
        else:
            natural_I = np.argsort(self.permutation)
        chunk_G = np.arange(self.groups) if self.group_C is None else np.argsort(self.group_C)
        return Places(row_I, chunk_G, np.arange(len(row_I)) // self.group_size, natural_I)

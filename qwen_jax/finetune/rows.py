"""Examples laid into rows and batches: packed, or one a row; the same for the same seed, epoch by epoch."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.finetune.data import IGNORED, Dataset
from qwen_jax.generation import bucket

OPEN_ROWS = 64  # rows that a new example may still go to: little is left free, and examples stay about where they were
SORTED_BATCHES = 16  # batches whose examples are sorted by length together, so that little is padded


class Batch(NamedTuple):
    """What a step computes on, arrays of [accumulate, B, T] (one accumulation: [B, T]).

    Attributes:
        ids: int32 token ids.
        targets: int32, the token to predict at each position, `IGNORED` for none.
        positions: int32, counted from the start of each conversation.
        segments: int32, the conversation of each token from 1, 0 padding; None where a row holds one.
        lengths: int32 [..., B], tokens of each row.
    """

    ids: Any
    targets: Any
    positions: Any
    segments: Any
    lengths: Any


class Rows:
    """All batches of a run, known beforehand: `batch(step)` depends on the dataset and the arguments alone.

    Attributes:
        steps: of the whole run.
        padding: part of all rows' tokens that is padding.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        length: int,
        batch_size: int,
        accumulate: int,
        packing: bool,
        epochs: int,
        max_steps: int | None,
        seed: int,
    ):
        self.dataset, self.length, self.packing = dataset, length, packing
        self.batch_size, self.accumulate = batch_size, accumulate
        self._steps: list[list[list[list[int]]]] = []  # step → accumulation → row → examples
        for epoch in range(epochs):
            if max_steps is not None and len(self._steps) >= max_steps:
                break
            order = np.random.default_rng((seed, epoch)).permutation(len(dataset.examples)).tolist()
            rows = self._pack(order) if packing else [[number] for number in self._sort(order)]
            batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            if not packing:  # neighbours in length share a batch; the batches come in any order
                mixed = np.random.default_rng((seed, epoch, 1)).permutation(len(batches))
                batches = [batches[number] for number in mixed]
            self._steps += [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
        self._steps = self._steps[:max_steps]
        self.steps = len(self._steps)
        tokens = sum(
            len(dataset.examples[n].ids_T) for step in self._steps for part in step for row in part for n in row
        )
        self.padding = 1 - tokens / sum(self._shape(step)[1] * batch_size * accumulate for step in self._steps)

    def batch(self, step: int) -> Batch:
        """The batch of a step, NumPy arrays."""
        parts = self._steps[step]
        _, T = self._shape(parts)
        shape = (self.accumulate, self.batch_size, T)
        ids, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
        targets, lengths = np.full(shape, IGNORED, np.int32), np.ones(shape[:2], np.int32)
        for a, rows in enumerate(parts):
            for b, row in enumerate(rows):
                start = 0
                for number, index in enumerate(row, 1):
                    example = self.dataset.examples[index]
                    inside = slice(start, start + len(example.ids_T))
                    ids[a, b, inside], targets[a, b, inside] = example.ids_T, example.targets_T
                    positions[a, b, inside], segments[a, b, inside] = np.arange(len(example.ids_T)), number
                    start = inside.stop
                lengths[a, b] = max(start, 1)
        if not self.packing:
            positions[:] = np.arange(T)
        return Batch(ids, targets, positions, segments if self.packing else None, lengths)

    def _shape(self, parts: Sequence[Sequence[Sequence[int]]]) -> tuple[int, int]:
        if self.packing:
            return self.batch_size, self.length
        longest = max(len(self.dataset.examples[n].ids_T) for rows in parts for row in rows for n in row)
        return self.batch_size, min(bucket(longest), self.length)

    def _pack(self, order: Sequence[int]) -> list[list[int]]:
        """Each example into the first open row with room for it."""
        rows: list[list[int]] = []
        room: list[int] = []
        first = 0
        for number in order:
            size = len(self.dataset.examples[number].ids_T)
            place = next((row for row in range(first, len(rows)) if room[row] >= size), None)
            if place is None:
                place = len(rows)
                rows.append([])
                room.append(self.length)
                first = max(first, place + 1 - OPEN_ROWS)
            rows[place].append(number)
            room[place] -= size
        return rows

    def _sort(self, order: Sequence[int]) -> list[int]:
        window, result = self.batch_size * SORTED_BATCHES, []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            result += sorted(part, key=lambda number: len(self.dataset.examples[number].ids_T))
        return result


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of warm-up: a number below 1 is a part of all steps."""
    return min(math.ceil(warmup * steps) if warmup < 1 else int(warmup), steps)

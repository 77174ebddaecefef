"""Calibration activations between two steps of the pipeline: on the devices, the host, or disk, as there is room."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np


def device_room(devices: Sequence[jax.Device], needed: int) -> int:
    """Bytes of activations that the devices can keep between them, beside `needed` on each; 0 for CPUs.

    At most half of what is free: what a step takes for itself is an estimate.
    """
    statistics = [device.memory_stats() or {} for device in devices]
    if any(device.platform == "cpu" for device in devices) or any("bytes_limit" not in each for each in statistics):
        return 0
    free = min(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in statistics)
    return len(devices) * max(min(free // 2, free - needed), 0)


class ActivationStore:
    """Arrays by (name, batch): left on their device while `device_limit` bytes last, then on the host, then on disk.

    Attributes:
        moved: bytes that went from the devices to the host, in all.
        spilled: bytes that went to disk, in all.
    """

    def __init__(self, limit: int, folder: Path, device_limit: int = 0):
        """`limit` bytes on the host; `folder` takes the files, in a folder of their own that goes with the store."""
        self._limit, self._parent, self._device_limit = limit, folder, device_limit
        self._held: dict[tuple[str, int], np.ndarray | jax.Array] = {}
        self._used = self._device_used = 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self.moved = self.spilled = 0

    def put(self, name: str, batch: int, array) -> None:
        """Keeps an array under (name, batch), in place of what was there."""
        self.drop(name, batch)
        if isinstance(array, jax.Array):
            if self._device_used + array.nbytes <= self._device_limit:
                self._device_used += array.nbytes
                self._held[name, batch] = array
                return
            self.moved += array.nbytes
        array = np.asarray(array)
        if self._used + array.nbytes <= self._limit:
            self._used += array.nbytes
            self._held[name, batch] = array
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix=".activations-", dir=self._parent)
        file = np.memmap(Path(self._folder.name) / f"{name}-{batch}", array.dtype, "w+", shape=array.shape)
        file[...] = array
        self.spilled += array.nbytes
        self._held[name, batch] = file

    def get(self, name: str, batch: int) -> np.ndarray | jax.Array:
        """The array, where it lies."""
        return self._held[name, batch]

    def drop(self, name: str, batch: int) -> None:
        """Forgets an array, if it is there."""
        old = self._held.pop((name, batch), None)
        if isinstance(old, np.memmap):
            assert self._folder is not None
            (Path(self._folder.name) / f"{name}-{batch}").unlink(missing_ok=True)
        elif isinstance(old, jax.Array):
            self._device_used -= old.nbytes
        elif old is not None:
            self._used -= old.nbytes

    def close(self) -> None:
        """Removes everything."""
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

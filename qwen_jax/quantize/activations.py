"""Calibration activations between two steps of the pipeline: on the host, and on disk past a limit."""

import tempfile
from pathlib import Path

import numpy as np


class ActivationStore:
    """Arrays by (name, batch), in memory while `limit` bytes last, then in files of their own.

    Attributes:
        spilled: bytes that went to disk, in all.
    """

    def __init__(self, limit: int, folder: Path):
        """`folder` takes the files, in a folder of their own that disappears with the store."""
        self._limit, self._parent = limit, folder
        self._held: dict[tuple[str, int], np.ndarray] = {}
        self._used = 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self.spilled = 0

    def put(self, name: str, batch: int, array) -> None:
        """Keeps an array under (name, batch), in place of what was there."""
        self.drop(name, batch)
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

    def get(self, name: str, batch: int) -> np.ndarray:
        """The array."""
        return self._held[name, batch]

    def drop(self, name: str, batch: int) -> None:
        """Forgets an array, if it is there."""
        old = self._held.pop((name, batch), None)
        if isinstance(old, np.memmap):
            assert self._folder is not None
            (Path(self._folder.name) / f"{name}-{batch}").unlink(missing_ok=True)
        elif old is not None:
            self._used -= old.nbytes

    def close(self) -> None:
        """Removes everything."""
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

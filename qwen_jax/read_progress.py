"""How far the reading of a checkpoint is, in bytes, for whoever waits for it."""

from collections.abc import Callable

from converters.huggingface import Checkpoint, Module
from converters.safetensors_files import Runs

#: Called with the bytes read so far and their number.
Progress = Callable[[int, int], None]


class WatchedCheckpoint(Checkpoint):
    """A `Checkpoint` that tells after each matrix how much has been read; read twice, as over a mesh, counts once."""

    def __init__(self, folder, progress: Progress):
        super().__init__(folder)
        self._progress, self._left = progress, {path: self.nbytes(path) for path in self.paths}
        self._total = sum(self._left.values())

    def read(self, path: str, rows: Runs | None = None, columns: Runs | None = None) -> Module:
        """See `Checkpoint.read`; a part counts as the whole, for no other follows in this process."""
        module = super().read(path, rows, columns)
        self._tell(path)
        return module

    def read_vector(self, path: str):
        """See `Checkpoint.read_vector`."""
        vector = super().read_vector(path)
        self._tell(path)
        return vector

    def _tell(self, path: str) -> None:
        if self._left.pop(path, 0):
            self._progress(self._total - sum(self._left.values()), self._total)


def open_checkpoint(folder, progress: Progress | None) -> Checkpoint:
    """The checkpoint in `folder`, watched where somebody wants to know."""
    return Checkpoint(folder) if progress is None else WatchedCheckpoint(folder, progress)

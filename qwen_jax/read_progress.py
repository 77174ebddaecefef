"""How far the reading of a checkpoint is, in bytes, for whoever waits for it."""

from collections.abc import Callable, Mapping
from typing import Any

from converters.huggingface import Checkpoint
from converters.safetensors_files import Runs
from qwen_jax.converted_modules import ConvertedModules

#: Called with the bytes read so far and their number.
Progress = Callable[[int, int], None]


class Watched:
    """The reading side of a checkpoint that tells after each matrix how much has been read.

    What is read twice, as over a mesh, counts once, and a part as the whole: no other follows in this process.
    """

    def watch(self, progress: Progress, sizes: Mapping[str, int]) -> None:
        """Tells `progress` from now on; `sizes` are the bytes of each path."""
        self._progress, self._left, self._total = progress, dict(sizes), sum(sizes.values())

    def read(self, path: str, rows: Runs | None = None, columns: Runs | None = None) -> Any:
        """See `Checkpoint.read`."""
        return self._tell(path, super().read(path, rows, columns))  # type: ignore[misc]

    def read_vector(self, path: str) -> Any:
        """See `Checkpoint.read_vector`."""
        return self._tell(path, super().read_vector(path))  # type: ignore[misc]

    def _tell(self, path: str, found: Any) -> Any:
        if self._left.pop(path, 0):
            self._progress(self._total - sum(self._left.values()), self._total)
        return found


class WatchedCheckpoint(Watched, Checkpoint):
    """A watched Hugging Face folder."""


class WatchedModules(Watched, ConvertedModules):
    """A watched folder that `convert` wrote."""


def open_checkpoint(folder, progress: Progress | None) -> Checkpoint:
    """The checkpoint in `folder`, watched where somebody wants to know."""
    if progress is None:
        return Checkpoint(folder)
    checkpoint = WatchedCheckpoint(folder)
    checkpoint.watch(progress, {path: checkpoint.nbytes(path) for path in checkpoint.paths})
    return checkpoint


def open_modules(folder, progress: Progress | None) -> ConvertedModules:
    """The same of a folder that `convert` wrote."""
    if progress is None:
        return ConvertedModules(folder)
    modules = WatchedModules(folder)
    modules.watch(progress, modules.sizes())
    return modules

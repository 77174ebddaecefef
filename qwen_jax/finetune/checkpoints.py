"""Training states on disk: each appears complete or not at all, the last few are kept."""

import re
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from qwen_jax.errors import CheckpointError
from qwen_jax.finetune.programs import State


class Checkpoints:
    """The folder `checkpoints` of a run: step-00000100, step-00000200, …, written by Orbax under another name first."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder.absolute(), keep
        self._checkpointer = ocp.StandardCheckpointer()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, state: State) -> None:
        """Writes a state, then forgets the oldest ones."""
        step = int(state.step)
        if step in self.steps():
            return
        self._checkpointer.save(self._path(step), _leaves(state))
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self._path(old))

    def restore(self, like: State) -> State | None:
        """The newest state, laid out as `like`; None if there is none.

        Raises:
            CheckpointError: it is damaged or of another shape.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _leaves(like)
        )
        try:
            leaves = self._checkpointer.restore(path, abstract)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be restored ({str(error).splitlines()[0]:.120}); remove it to go on from the one "
                "before, or start again."
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in sorted(leaves)])

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._checkpointer.close()

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"


def _leaves(state: State) -> dict[str, jax.Array]:
    """By number: a checkpoint does not depend on how optax names its states."""
    return {f"{number:06}": leaf for number, leaf in enumerate(jax.tree.leaves(state))}

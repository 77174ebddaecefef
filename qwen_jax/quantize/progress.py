"""What an interrupted quantization leaves: the finished layers, and by which input and settings they were made."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.quantize.settings import QuantizeSettings

logger = logging.getLogger("qwen_jax")

FORMAT = 2  # of the folder, and of the arithmetic: raise it when the same input gives other numbers
READ_BYTES = 1 << 24  # of the source at once
LEAVES, STATIC = ("packed", "scales", "zeros", "permutation"), ("bits", "group_size", "in_features")


def fingerprint(
    source: Path,
    settings: QuantizeSettings,
    rows: Sequence[np.ndarray],
    dtype: str,
    batch_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """What the result depends on, by content: {"format", "source", "settings", "calibration"}.

    `progress` is called with the bytes of the source read so far and their number.
    """
    content, done = hashlib.sha256(), 0
    names = ("config.json", "model.safetensors.index.json")
    files = [file for file in sorted(source.iterdir()) if file.suffix == ".safetensors" or file.name in names]
    files = [file for file in files if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    for file in files:
        content.update(f"{file.name}\n".encode())
        own = hashlib.sha256()
        with file.open("rb") as stream:
            while part := stream.read(READ_BYTES):
                own.update(part)
                done += len(part)
                progress(done, total)
        content.update(own.digest())
    tokens = hashlib.sha256()
    for row in rows:
        tokens.update(np.int64(len(row)).tobytes() + np.ascontiguousarray(row, np.int32).tobytes())
    how = dataclasses.asdict(settings) | {"dtype": dtype, "batch_tokens": batch_tokens}
    return {
        "format": str(FORMAT),
        "source": content.hexdigest(),
        "settings": json.dumps(how, sort_keys=True, default=dict),
        "calibration": tokens.hexdigest(),
    }


class Progress:
    """The finished layers of a run, in a folder beside the target; a layer counts once progress.json names it."""

    def __init__(self, folder: Path, mark: Mapping[str, str]):
        """Takes up what `folder` holds if it was made by the same `mark`, else says why not and starts anew."""
        self.folder, self.mark = folder, dict(mark)
        self.layers: list[dict[str, Any]] = []
        reason = self._load()
        if reason is not None:
            logger.warning("%s: %s; starting again from layer 0.", folder, reason)
            self.layers = []
            shutil.rmtree(folder)
        elif self.layers:
            logger.info("%s: going on after %d finished layers.", folder, len(self.layers))
        folder.mkdir(parents=True, exist_ok=True)

    def _load(self) -> str | None:
        """None if what is there can be used (or nothing is), else the reason why not."""
        if not self.folder.exists():
            return None
        file = self.folder / "progress.json"
        if not file.exists():
            return "was interrupted before its first layer was done"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            old, layers = dict(raw["mark"]), list(raw["layers"])
            digests = [entry["sha256"] for entry in layers]
        except (ValueError, KeyError, TypeError):
            return "progress.json is damaged"
        changed = [key for key in self.mark if old.get(key) != self.mark[key]]
        if changed:
            return f"was made with other {' and '.join(changed)}"
        for number, digest in enumerate(digests):
            path = self._file(number)
            if not path.is_file() or _digest(path) != digest:
                return f"{path.name} is missing or damaged"
        self.layers = layers
        return None

    def read(self, number: int) -> dict[str, QuantizedTensor]:
        """The tensors of a finished layer."""
        with safe_open(self._file(number), "numpy") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}
            static = json.loads(file.metadata()["static"])
        tensors = {}
        for path, numbers in static.items():
            leaves = {leaf: stored.get(f"{path}.{leaf}") for leaf in LEAVES}
            tensors[path] = QuantizedTensor(**leaves, **numbers)
        return tensors

    def add(self, tensors: Mapping[str, QuantizedTensor], reports: list[dict[str, Any]]) -> None:
        """Keeps the next layer; after that an interruption loses nothing of it."""
        number, leaves, static = len(self.layers), {}, {}
        for path, tensor in tensors.items():
            static[path] = {name: getattr(tensor, name) for name in STATIC}
            for leaf in LEAVES:
                if (array := getattr(tensor, leaf)) is not None:
                    # safetensors writes memory order under the logical shape
                    leaves[f"{path}.{leaf}"] = np.ascontiguousarray(array)
        temporary = self._file(number).with_suffix(".tmp")
        try:
            save_file(leaves, temporary, metadata={"static": json.dumps(static)})
        except SafetensorError as error:
            raise OSError(f"{temporary}: {error}. Free some disk space and run the same command again.") from error
        os.replace(temporary, self._file(number))
        self.layers.append({"sha256": _digest(self._file(number)), "reports": reports})
        temporary = self.folder / "progress.tmp"
        temporary.write_text(json.dumps({"mark": self.mark, "layers": self.layers}), encoding="utf-8")
        os.replace(temporary, self.folder / "progress.json")

    def remove(self) -> None:
        """Forgets everything, once the target is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"layer-{number:05}.safetensors"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""The tensors of a folder of safetensors files, found from the headers alone and read one at a time."""

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
Runs = tuple[slice, ...]  # places along a dimension, in order, none of them twice
DAMAGED = "the file is damaged or not fully downloaded; download it again"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, known from its header.

    Attributes:
        name: in the file.
        file: the file.
        dtype: as safetensors spells it, e.g. "BF16".
        shape: of the array.
        offset: of its first byte in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype:
        """The NumPy type; CheckpointError for one that no supported checkpoint uses."""
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.file}: {self.name}: dtype {self.dtype} is not one of {', '.join(DTYPES)}.")
        return DTYPES[self.dtype]

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The array, or some of its rows; nothing else of the file is read."""
        start, stop, _ = rows.indices(self.shape[0] if self.shape else 1)
        width = math.prod(self.shape[1:])
        offset = self.offset + start * width * self.numpy_dtype.itemsize
        flat = np.fromfile(self.file, self.numpy_dtype, (stop - start) * width, offset=offset)
        return flat.reshape((stop - start, *self.shape[1:]) if self.shape else ())

    def read_box(self, rows: Runs | None, columns: Runs | None) -> np.ndarray:
        """Some rows and columns of a matrix, None for all: of the file their bytes alone are read."""
        if rows is None and columns is None:
            return self.read()
        height, width = self.shape
        rows, columns = rows or (slice(0, height),), columns or (slice(0, width),)
        if [(run.start, run.stop) for run in columns] == [(0, width)]:
            return np.concatenate([self.read(run) for run in rows])
        size, dtype = self.numpy_dtype.itemsize, self.numpy_dtype
        result = np.empty((length(rows), length(columns)), dtype)
        with self.file.open("rb", buffering=0) as stream:
            numbers = (row for run in rows for row in range(run.start, run.stop))
            for place, row in enumerate(numbers):
                start = 0
                for run in columns:
                    part = result[place, start : start + run.stop - run.start]
                    stream.seek(self.offset + (row * width + run.start) * size)
                    if stream.readinto(part.view(np.uint8)) != part.nbytes:
                        raise CheckpointError(f"{self.file}: {self.name}: ends too early; {DAMAGED}.")
                    start += len(part)
        return result


def length(runs: Runs) -> int:
    """Places in all runs together."""
    return sum(run.stop - run.start for run in runs)


def at_runs(array: np.ndarray, runs: Runs | None, axis: int) -> np.ndarray:
    """These places of one axis; all for None."""
    if runs is None:
        return array
    return np.concatenate([array[(slice(None),) * axis + (run,)] for run in runs], axis)


def header(file: Path) -> dict[str, StoredTensor]:
    """A file's tensors by name.

    Raises:
        CheckpointError: if the file is truncated, longer than its header says, or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file}: has {size} bytes, too few for its header; {DAMAGED}.")
        try:
            raw = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{file}: is no safetensors file ({error}); {DAMAGED}.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: its header is a {type(raw).__name__}, expected an object; {DAMAGED}.")
    raw.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in raw.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise CheckpointError(f"{file}: {name}: its header entry is {entry!r:.80}; {DAMAGED}.")
        begin, stop = entry["data_offsets"]
        tensor = StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
        if tensor.dtype in DTYPES and stop - begin != tensor.nbytes:
            raise CheckpointError(
                f"{file}: {name}: {stop - begin} bytes for {tensor.dtype} {list(tensor.shape)}, expected "
                f"{tensor.nbytes}; {DAMAGED}."
            )
        tensors[name] = tensor
        end = max(end, stop)
    if size != 8 + length + end:
        raise CheckpointError(f"{file}: has {size} bytes, expected {8 + length + end} by its header; {DAMAGED}.")
    return tensors


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder: those that its index names, or those of its only safetensors file.

    Raises:
        CheckpointError: for no or several candidate files, pickled weights, a missing shard, a tensor that is not in
            the shard the index names, a damaged file.
    """
    index = _index(folder)
    if index is None:
        return header(_only_file(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map, expected one from tensor names to files.")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: names {shard!r}, expected a file in the same folder.")
        if not (folder / shard).is_file():
            missing = [name for name, file in weight_map.items() if file == shard]
            raise CheckpointError(
                f"{folder / shard}: no such file, but {index.name} puts {len(missing)} tensors there (first "
                f"{missing[0]}); download it."
            )
        shards[shard] = header(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{folder / shard}: {name} is not in it, but {index.name} says so; the index and the shards are of "
                "different checkpoints."
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _index(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.safetensors.index.json"))
    standard = folder / "model.safetensors.index.json"
    if standard in found or not found:
        return standard if found else None
    if len(found) > 1:
        raise CheckpointError(f"{folder}: has several indices ({_listed(found)}), expected one; remove the others.")
    return found[0]


def _only_file(folder: Path) -> Path:
    found = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))
    standard = folder / "model.safetensors"
    if standard in found:
        return standard
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: has several safetensors files ({_listed(found)}) but no index that says which tensors count; "
            "download model.safetensors.index.json, or keep one file."
        )
    pickled = sorted(file for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise CheckpointError(
            f"{pickled[0]}: pickled weights are not read, because unpickling can run any code the file contains; "
            "convert them to safetensors where you trust them (transformers: model.save_pretrained(folder)), or take a "
            "revision of the model that has safetensors."
        )
    raise CheckpointError(f"{folder}: has no *.safetensors file, expected the model's weights.")


def _listed(files: list[Path]) -> str:
    return ", ".join(file.name for file in files)

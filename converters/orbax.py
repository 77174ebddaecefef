"""Our own checkpoint: arrays in Orbax's format, a JSON manifest, and the source's small files, in one folder.

    config.json, quantize_config.json, tokenizer files …     as in the source
    arrays/                                                  Orbax: one Zarr array a state entry, not compressed
    qwen_jax.json                                            shapes, dtypes and file sizes of the arrays; metadata

Arrays lie uncompressed, in chunks of 16 MiB with a file each (no OCDBT), so that restoring is bound by reading and
uses all cores. Measured with 2 cores and Orbax 0.12.8: zstd would shrink packed Int4 weights by 15 % and restore them
1.3 times as slowly; whole arrays instead of chunks, SmolLM2's 110 MB, in 0.25 s instead of 0.12 s (medians).
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from converters.folders import complete_or_absent, copy_side_files
from converters.safetensors_files import Runs
from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json

MANIFEST, ARRAYS, VERSION = "qwen_jax.json", "arrays", 1
CHUNK_BYTES = 16 << 20
PART_BYTES = 256 << 20  # restored at once where somebody watches; enough that parts cost no speed


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint of this format (or what is left of one)."""
    return (Path(folder) / MANIFEST).is_file() or (Path(folder) / ARRAYS / "_CHECKPOINT_METADATA").is_file()


def save(
    folder: str | Path,
    state: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint; the folder appears complete or not at all.

    Args:
        folder: to be made.
        state: names → NumPy or JAX arrays (any sharding), of any memory order; bfloat16 and int4 keep their dtype.
        metadata: anything JSON can hold: what the arrays alone do not say.
        source: a checkpoint folder whose configuration and tokenizer files are copied.
        overwrite: replace a folder that is there.

    Raises:
        CheckpointError: if the folder is there and `overwrite` is false.
        ValueError: if `state` is empty, or holds 64-bit arrays, which JAX would restore as 32-bit ones.
    """
    if not state:
        raise ValueError("state is empty, expected at least one array.")
    # NumPy views are made contiguous here: storage libraries have written such in memory order.
    arrays = {
        name: value if isinstance(value, jax.Array) else np.ascontiguousarray(value).reshape(np.shape(value))
        for name, value in state.items()
    }
    for name, array in arrays.items():
        if array.dtype.kind not in "iufbV" or (array.dtype.kind in "iuf" and array.dtype.itemsize > 4):
            raise ValueError(f"{name}: dtype {array.dtype.name}, expected a number of at most 32 bits.")
    with complete_or_absent(folder, overwrite) as temporary:
        if source is not None:
            copy_side_files(source, temporary, "config.json", "quantize_config.json")
        with _checkpointer() as checkpointer, _without_ocdbt_warning():
            chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
            checkpointer.save(temporary / ARRAYS, args=ocp.args.PyTreeSave(arrays, save_args=chunks))
        manifest = {
            "format": "qwen-jax",
            "version": VERSION,
            "arrays": {name: {"shape": list(a.shape), "dtype": a.dtype.name} for name, a in arrays.items()},
            "files": _file_sizes(temporary),
            "metadata": dict(metadata),
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def describe(folder: str | Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """Shapes and dtypes of a checkpoint's arrays, and its metadata; reads the manifest alone.

    Raises:
        CheckpointError: if the checkpoint is half-written, incomplete, or of a later version.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}; the checkpoint was not written to its end. Convert again.")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != "qwen-jax" or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r} version {manifest.get('version')!r}, expected "
            f"'qwen-jax' version {VERSION}; convert the model again."
        )
    here, expected = _file_sizes(folder), manifest["files"]
    wrong = [name for name, size in expected.items() if here.get(name) != size]
    if wrong:
        raise CheckpointError(
            f"{folder / wrong[0]}: has {here.get(wrong[0], 0)} bytes, expected {expected[wrong[0]]} ({len(wrong)} of "
            f"{len(expected)} files differ from {MANIFEST}); copy the folder again, or convert again."
        )
    arrays = manifest["arrays"].items()
    return {name: jax.ShapeDtypeStruct(tuple(a["shape"]), a["dtype"]) for name, a in arrays}, manifest["metadata"]


def restore(
    folder: str | Path,
    *,
    abstract: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | jax.sharding.Sharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Reads a checkpoint, each device its own part.

    Args:
        folder: written by `save`.
        abstract: what the caller expects; names, shapes and dtypes must be those of the file.
        shardings: where arrays go: one for all, or one a name (those of `abstract` count otherwise); by default the
            first device.
        progress: called with the bytes restored so far and their number.

    Returns: the arrays by name, and the metadata.

    Raises:
        CheckpointError: if the checkpoint is incomplete, or differs from `abstract` in a name, a shape or a dtype.
    """
    folder = Path(folder).absolute()
    found, metadata = describe(folder)
    if abstract is not None:
        _compare(folder, found, abstract)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def sharding(name: str) -> jax.sharding.Sharding:
        if isinstance(shardings, jax.sharding.Sharding):
            return shardings
        if shardings is not None and name in shardings:
            return shardings[name]
        return getattr((abstract or {}).get(name), "sharding", None) or first

    arguments = {name: ocp.ArrayRestoreArgs(sharding=sharding(name), dtype=a.dtype) for name, a in found.items()}
    sizes = {name: math.prod(a.shape) * a.dtype.itemsize for name, a in found.items()}
    state: dict[str, jax.Array] = {}
    with _checkpointer() as checkpointer:
        for names in [list(found)] if progress is None else _parts(sizes):
            some, how = ({name: each[name] for name in names} for each in (found, arguments))
            wanted = ocp.args.PyTreeRestore(some, restore_args=how, partial_restore=len(some) < len(found))
            state |= checkpointer.restore(folder / ARRAYS, args=wanted)
            if progress is not None:
                progress(sum(sizes[name] for name in state), sum(sizes.values()))
    return state, metadata


def _parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in runs of at least `PART_BYTES`, but for the last."""
    parts: list[list[str]] = [[]]
    for name in sizes:
        if sum(sizes[each] for each in parts[-1]) >= PART_BYTES:
            parts.append([])
        parts[-1].append(name)
    return parts


def read_array(
    folder: str | Path, name: str, index: int | None = None, rows: Runs | None = None, columns: Runs | None = None
) -> np.ndarray:
    """One array of a checkpoint, or its entry `index` along the first axis; of the rest no chunk is read.

    Args:
        folder: of the checkpoint.
        name: of the array.
        index: along the first axis.
        rows: runs of the (entry's) first axis; None for all.
        columns: likewise of the second.
    """
    store = {"driver": "file", "path": str(Path(folder).absolute() / ARRAYS / name)}
    array = tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True).result()
    array = array if index is None else array[index]
    if rows is None and columns is None:
        return np.asarray(array.read().result())
    parts = [[array[row, column].read() for column in columns or (slice(None),)] for row in rows or (slice(None),)]
    return np.block([[part.result() for part in line] for line in parts])


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False))


@contextlib.contextmanager
def _without_ocdbt_warning() -> Iterator[None]:
    """Keeps Orbax 0.12 from warning that there is nothing to merge in a format that is not in use."""

    def relevant(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(relevant)
    try:
        yield
    finally:
        logger.removeFilter(relevant)


def _file_sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in (folder / ARRAYS).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _compare(folder: Path, found: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            f"{folder}: lacks arrays {missing[:5]} and has unexpected ones {extra[:5]} ({len(missing)}, "
            f"{len(extra)}); it was made from another model or with other options. Convert again."
        )
    for name, want in wanted.items():
        have = found[name]
        if have.shape != tuple(want.shape) or have.dtype != want.dtype:
            raise CheckpointError(
                f"{folder}: {name}: {have.dtype.name} {list(have.shape)}, expected {np.dtype(want.dtype).name} "
                f"{list(want.shape)}; nothing is cast or cut on restoring. Convert again with the options you want."
            )

"""Checkpoint folders that appear complete or not at all, and the small files that travel with the weights."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.errors import CheckpointError

SIDE_FILES = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "*.tiktoken",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
)


@contextlib.contextmanager
def complete_or_absent(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside `folder` and renames it to `folder` once the block has ended without an error.

    A process that is killed leaves the temporary folder (".NAME.incomplete-PID") and never half a checkpoint.

    Raises:
        CheckpointError: if `folder` is there and not empty, and `overwrite` is false.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already; remove it or ask to overwrite it.")
    temporary = folder.with_name(f".{folder.name}.incomplete-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_side_files(source: str | Path, target: Path, *more: str) -> None:
    """Copies the tokenizer's and the generation settings' files, and those in `more`, where there are such."""
    for pattern in (*SIDE_FILES, *more):
        for file in sorted(Path(source).glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)

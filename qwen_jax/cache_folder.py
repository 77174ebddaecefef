"""The user's cache folder, and writing into it so that an interrupted command leaves nothing half done."""

import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator


def cache_folder() -> pathlib.Path:
    """Where made checkpoints and compiled programs are kept; it need not exist yet.

    $QWEN_JAX_CACHE if set, else `qwen-jax` in the platform's folder for caches: $XDG_CACHE_HOME or ~/.cache,
    ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    """
    if chosen := os.environ.get("QWEN_JAX_CACHE"):
        return pathlib.Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        base = pathlib.Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = pathlib.Path(os.environ.get("LOCALAPPDATA", pathlib.Path.home() / "AppData" / "Local"))
    else:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return base / "qwen-jax"


@contextlib.contextmanager
def atomic_folder(destination: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a new empty folder beside `destination` and renames it to `destination` when the block ends well.

    So `destination` either is complete or does not exist, also after Ctrl-C or a full disk. If another process finished
    the same folder first, its copy stays and this one is dropped.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    working = pathlib.Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield working
        working.chmod(0o755)  # mkdtemp's 0o700 would hide a shared cache from others
        try:
            working.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)

"""Where made checkpoints and compiled programs are kept on this machine."""

import os
import pathlib
import sys


def cache_folder() -> pathlib.Path:
    """The user's cache folder; it need not exist yet.

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

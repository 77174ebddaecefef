"""JAX's persistent compilation cache: programs compiled once are read back at the next start."""

import pathlib

import jax

from .cache_folder import cache_folder


def enable(folder: pathlib.Path | None = None) -> pathlib.Path | None:
    """Keeps compiled programs in `folder` (None: `compiled` in the user's cache folder) and returns it.

    A program changes JAX's settings, never an import: call this at the start of one. Where the user chose a folder
    (JAX_COMPILATION_CACHE_DIR) that one stays, and JAX_ENABLE_COMPILATION_CACHE=0 switches it off (returns None). JAX
    skips programs that took under a second to compile, which most of ours do on a CPU: both floors are removed.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if chosen := jax.config.jax_compilation_cache_dir:
        folder = pathlib.Path(chosen)
    else:
        folder = folder or cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder

"""`qwen-jax convert`: a Hugging Face checkpoint to our own, which loads faster, and back."""

import pathlib
import time
from typing import Annotated

import typer

from .common import Debug, Json, Model, is_converted, print_json, progress_bars

EXAMPLES = """
qwen-jax convert Qwen/Qwen-7B-Chat-Int4 qwen-7b-int4
qwen-jax convert ./downloaded-folder ./converted && qwen-jax chat ./converted
qwen-jax convert ./converted ./again        # back to the files AutoGPTQ and vLLM read, the same to the byte
"""


def run(
    source: Model,
    target: Annotated[pathlib.Path, typer.Argument(help="The folder to write; it must not exist.", metavar="TARGET")],
    json: Json = False,
    debug: Debug = False,
):
    """Write a checkpoint in our own format, or one in our own format as a Hugging Face folder; the same weights."""
    from ..checkpoint_store import convert, find
    from ..export import export
    from .progress import BYTES

    start = time.perf_counter()
    folder = find(source)
    step, unit, write = ("Writing", "matrices", export) if is_converted(folder) else ("Reading", BYTES, convert)
    with progress_bars() as update:
        write(folder, target, lambda done, total: update(f"{step} {folder.name}", done, total, unit=unit))
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if json:
        print_json({"target": str(target), "bytes": size, "seconds": round(seconds, 2)})
    else:
        print(f"{target}: {size / 1e6:.1f} MB written in {seconds:.1f} s")

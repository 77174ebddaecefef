"""`qwen-jax convert`: a Hugging Face checkpoint to our own, which loads faster."""

import pathlib
import time
from typing import Annotated

import typer

from .common import Debug, Json, Model, print_json

EXAMPLES = """
qwen-jax convert Qwen/Qwen-7B-Chat-Int4 qwen-7b-int4
qwen-jax convert ./downloaded-folder ./converted && qwen-jax chat ./converted
"""


def run(
    source: Model,
    target: Annotated[pathlib.Path, typer.Argument(help="The folder to write; it must not exist.", metavar="TARGET")],
    json: Json = False,
    debug: Debug = False,
):
    """Write a checkpoint in our own format, with the same weights."""
    if target.exists():
        raise FileExistsError(f"{target}: exists already. Remove it, or name another folder.")
    from ..cache_folder import atomic_folder
    from ..checkpoint_store import convert

    start = time.perf_counter()
    with atomic_folder(target.absolute()) as working:
        convert(source, working / "checkpoint")
        (working / "checkpoint").rename(working / "…")
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if json:
        print_json({"target": str(target), "bytes": size, "seconds": round(seconds, 2)})
    else:
        print(f"{target}: {size / 1e6:.1f} MB written in {seconds:.1f} s")

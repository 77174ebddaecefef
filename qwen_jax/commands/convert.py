"""`qwen-jax convert`: a Hugging Face checkpoint to our own, which loads faster."""

import pathlib
import time
from typing import Annotated

import typer

from .common import Debug, Json, Model, print_json, status

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
    from ..checkpoint_store import convert

    start = time.perf_counter()
    with status(f"Converting {source}"):
        convert(source, target)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if json:
        print_json({"target": str(target), "bytes": size, "seconds": round(seconds, 2)})
    else:
        print(f"{target}: {size / 1e6:.1f} MB written in {seconds:.1f} s")

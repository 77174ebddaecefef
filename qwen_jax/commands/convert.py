"""`qwen-jax convert`: a Hugging Face checkpoint to our own, which loads faster, and back."""

import pathlib
import time
from typing import Annotated

import typer

from .common import Debug, Json, Model, print_json, status

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
    from converters import orbax

    from ..checkpoint_store import convert, find
    from ..export import export

    start = time.perf_counter()
    with status(f"Converting {source}"):
        (export if orbax.is_checkpoint(find(source)) else convert)(source, target)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if json:
        print_json({"target": str(target), "bytes": size, "seconds": round(seconds, 2)})
    else:
        print(f"{target}: {size / 1e6:.1f} MB written in {seconds:.1f} s")

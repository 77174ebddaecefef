"""`qwen-jax merge`: folds an adapter into a float checkpoint."""

import pathlib
from typing import Annotated

import typer

from .common import Debug, Json, print_json, progress_bars

EXAMPLES = """
qwen-jax merge Qwen/Qwen2.5-7B-Instruct ./adapter ./merged
qwen-jax quantize ./merged ./merged-int4 --calibration data.jsonl
"""


def run(
    model: Annotated[str, typer.Argument(help="The float base: a Hugging Face folder or a Hub id.", metavar="MODEL")],
    adapter: Annotated[pathlib.Path, typer.Argument(help="A LoRA adapter's folder.", metavar="ADAPTER")],
    out: Annotated[pathlib.Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    json: Json = False,
    debug: Debug = False,
):
    """Write the float model that a base and its adapter are together; a quantized base is refused."""
    import dataclasses

    from ..finetune.merge import merge
    from .progress import BYTES

    with progress_bars() as update:

        def progress(done: int, total: int) -> None:
            update("Merging", done, total, unit=BYTES)

        report = merge(model, adapter, out, overwrite=overwrite, progress=progress)
    if json:
        print_json({"target": str(out), **dataclasses.asdict(report)})
        return
    print(f"{out}: {report.modules} projections changed, {report.saved} modules replaced")
    if report.worst:
        print(f"Rounding took away at most {report.lost:.1%} of a projection's change ({report.worst})")

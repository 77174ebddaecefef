"""`qwen-jax quantize`: a float checkpoint to a GPTQ checkpoint."""

import json as json_module
import pathlib
import sys
import time
from typing import Annotated

import typer

from .common import Debug, Json, print_json, progress_bars, status

EXAMPLES = """
qwen-jax quantize Qwen/Qwen2.5-7B-Instruct qwen2.5-7b-int4 --calibration conversations.json
qwen-jax quantize ./float ./int4 --calibration text.txt --group-size 64 --asym
qwen-jax quantize ./float ./mixed --calibration data.jsonl --dynamic '{"+:.*down_proj": {"bits": 8}}'
"""


def run(
    source: Annotated[str, typer.Argument(help="A float Hugging Face folder or a Hub id.", metavar="SRC")],
    target: Annotated[pathlib.Path, typer.Argument(help="The folder to write.", metavar="DST")],
    calibration: Annotated[
        pathlib.Path,
        typer.Option(help="Conversations (.json, .jsonl) or plain text that the model should do well.", metavar="FILE"),
    ],
    rows: Annotated[int, typer.Option(help="Calibration rows at most.", min=1)] = 128,
    row_length: Annotated[int, typer.Option(help="Tokens of a row at most.", min=2)] = 512,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1: all of them.")] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One zero-point for all groups, or each its own.")] = True,
    desc_act: Annotated[bool, typer.Option("--desc-act", help="Act-order; costs a gather at run time.")] = False,
    static_groups: Annotated[bool, typer.Option("--static-groups", help="Scales from the unrounded weights.")] = False,
    group_aware: Annotated[
        bool, typer.Option("--group-aware/--natural", help="Order of rounding inside groups; free at run time.")
    ] = True,
    damp: Annotated[float, typer.Option(help="Damping, as a part of the mean diagonal of H.")] = 0.01,
    scale_search: Annotated[bool, typer.Option("--scale-search/--no-scale-search", help="Scales by error.")] = True,
    propagation: Annotated[
        float, typer.Option(help="How much earlier layers' errors are made up for; 0 is faster.", min=0, max=1)
    ] = 1.0,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output head too.")] = False,
    dynamic: Annotated[
        str | None, typer.Option(help="JSON: regular expression to settings, as GPTQModel's.", metavar="JSON")
    ] = None,
    format: Annotated[
        str, typer.Option(help="gptq, gptq_v2 (for GPTQModel with --asym) or compressed-tensors.")
    ] = "gptq",
    dtype: Annotated[str, typer.Option(help="Of activations: auto, float32 or bfloat16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it is there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on where the same command was interrupted.")
    ] = True,
    json: Json = False,
    debug: Debug = False,
):
    """Write a GPTQ checkpoint of a float model, calibrated on your text."""
    from .. import compilation_cache
    from ..checkpoint_store import find
    from ..quantize import QuantizeSettings, quantize, read_calibration
    from ..tokenizer import AutoTokenizer
    from .progress import BYTES

    settings = QuantizeSettings(
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        static_groups=static_groups,
        group_aware=group_aware,
        damp=damp,
        scale_search=scale_search,
        propagation=propagation,
        lm_head=lm_head,
        dynamic=_json_object(dynamic),
        format=format,
    )
    compilation_cache.enable()
    start = time.perf_counter()
    folder = find(source)
    with status(f"Reading {calibration}"):
        tokens = read_calibration(calibration, AutoTokenizer.from_pretrained(str(folder)), rows=rows, length=row_length)
    with progress_bars(announce=True) as update:

        def aside(step: str, done: int, total: int) -> None:
            update(step, done, total, unit=BYTES if step.startswith("Reading") else "parameters")

        def progress(report, done, total):
            update("Quantizing", done, total, unit="matrices", note=f"{report.path}, error {report.error:.1e}")

        try:
            how = {"dtype": dtype, "overwrite": overwrite, "resume": resume}
            reports = quantize(folder, target, tokens, settings, **how, progress=progress, aside=aside)
        except KeyboardInterrupt:
            print("Interrupted; the same command goes on at the layer it reached.", file=sys.stderr)
            raise
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    worst = max(reports, key=lambda report: report.error)
    if json:
        modules = [{"path": each.path, "bits": each.bits, "error": each.error, "damp": each.damp} for each in reports]
        print_json(
            {
                "target": str(target),
                "bytes": size,
                "seconds": round(seconds, 2),
                "calibration_tokens": sum(map(len, tokens)),
                "modules": modules,
            }
        )
    else:
        print(
            f"{target}: {size / 1e6:.1f} MB, {len(reports)} modules in {seconds:.1f} s from {sum(map(len, tokens))} "
            f"calibration tokens; largest relative error {worst.error:.2e} ({worst.path})"
        )


def _json_object(text: str | None) -> dict:
    if text is None:
        return {}
    try:
        value = json_module.loads(text)
    except json_module.JSONDecodeError as error:
        raise ValueError(f"--dynamic: is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"--dynamic: is {type(value).__name__}, expected an object of regular expressions.")
    return value

"""`qwen-jax bench`: speed at the true dimensions of a model, with random weights; no checkpoint needed."""

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from .common import Debug, Json, Kernels, status

EXAMPLES = """
qwen-jax bench decode --model qwen-7b --bits 4 --kv-bits 8 --batch 1 --context 2048
qwen-jax bench decode --model qwen-1.8b --batch 1 --batch 8 --batch 32 --output result.json
qwen-jax bench prefill --model qwen2.5-7b --context 2048
qwen-jax bench decode --model qwen-72b --mesh 1x2
"""


def run(
    what: Annotated[str, typer.Argument(help="decode or prefill.", metavar="decode|prefill")],
    model: Annotated[str, typer.Option(help="Dimensions: qwen-1.8b, qwen-7b, qwen2.5-7b, qwen3-8b, …")] = "qwen-7b",
    bits: Annotated[int, typer.Option(help="Of the weights: 4, 8 or 16.")] = 4,
    kv_bits: Annotated[int, typer.Option(help="Of the KV cache: 8 or 16.")] = 8,
    batch: Annotated[list[int], typer.Option(help="Rows; may be given several times.")] = [1],  # noqa: B006
    context: Annotated[list[int], typer.Option(help="Tokens before the step; may be given several times.")] = [2048],  # noqa: B006
    layers: Annotated[int | None, typer.Option(help="Only so many layers, for a quick look.")] = None,
    mesh: Annotated[str | None, typer.Option(help="Devices for rows x for each layer, as 1x2.", metavar="DxM")] = None,
    dtype: Annotated[str, typer.Option(help="Of activations and float weights.")] = "bfloat16",
    kernels: Kernels = "auto",
    rounds: Annotated[int, typer.Option(help="Timed repetitions, after a warm-up.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Also write results, device and versions here as JSON.")] = None,
    json: Json = False,
    debug: Debug = False,
):
    """Measure decode or prefill of a whole model and print it beside the bytes it must move."""
    from rich.console import Console

    from ..bench import decode, environment, prefill
    from ..bench.models import MODELS
    from ..sharding import parse_mesh

    devices = None if mesh is None else parse_mesh(mesh)
    modules = {"decode": decode, "prefill": prefill}
    for name, value, allowed in (("model", model, MODELS), ("bits", bits, (4, 8, 16)), ("what", what, modules)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is none of {list(allowed)}.")
    console = Console(quiet=json)
    facts: dict = {"environment": environment.environment()}
    facts["copy_gigabytes_per_second"] = environment.copy_bandwidth(1024 if dtype == "bfloat16" else 128) / 1e9
    console.print(f"{facts['environment']['device']}, copy {facts['copy_gigabytes_per_second']:.0f} GB/s")
    with status(f"Making random weights of {model}"):
        decoder = decode.build(model, bits=bits, dtype=dtype, kernels=kernels, layers=layers, mesh=devices)
    results = []
    for rows in batch:
        for length in context:
            with status(f"Compiling and measuring {what}, batch {rows}, context {length}"):
                result = modules[what].measure(
                    model, decoder, bits=bits, kv_bits=kv_bits, batch=rows, context=length, rounds=rounds, mesh=devices
                )
            results.append(dataclasses.asdict(result))
            console.print(result)
    facts["layers"] = decoder.config.num_layers
    facts["results"] = results
    if output is not None:
        output.write_text(json_module.dumps(facts, indent=1) + "\n")
    if json:
        print(json_module.dumps(facts))

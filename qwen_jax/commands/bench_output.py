"""What the subcommands of `qwen-jax bench` have in common: options, checks, and how results are printed and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import print_json

Bits = Annotated[list[int], typer.Option(help="Of the weights: 4, 8 or 16; may be given several times.")]
KvBits = Annotated[list[int], typer.Option(help="Of the KV cache: 8 or 16; may be given several times.")]
Batch = Annotated[list[int], typer.Option(help="Rows; may be given several times.", min=1)]
Context = Annotated[list[int], typer.Option(help="Tokens in the cache or prompt; may be given several times.", min=1)]
Dtype = Annotated[str, typer.Option(help="Of activations and float weights: auto, bfloat16, float16 or float32.")]
Output = Annotated[Path | None, typer.Option(help="Also write results, device and versions here as JSON.")]


def examples(lines: str, what: str) -> str:
    """The lines of a subcommand, for its --help."""
    found = [line for line in lines.strip().splitlines() if line.startswith(f"qwen-jax bench {what} ")]
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(found)


def check_values(name: str, values: Sequence, allowed: Sequence) -> None:
    """Refuses what is not allowed."""
    for value in values:
        if value not in allowed:
            raise ValueError(f"--{name} {value} is none of {', '.join(map(str, allowed))}.")


def resolve(dtype: str) -> str:
    """`auto`: bfloat16, or float16 on a GPU that does not compute in it."""
    check_values("dtype", [dtype], ["auto", "bfloat16", "float16", "float32"])
    if dtype != "auto":
        return dtype
    import jax

    from ..causal_lm import default_dtype

    return "float16" if default_dtype(jax.local_devices()[0]) == "float16" else "bfloat16"


def finish(
    what: str,
    results: list,
    copy: float | None,
    output: Path | None,
    json: bool,
    more: Mapping[str, Any] = {},  # noqa: B006
) -> None:
    """Prints the table or the JSON, writes the file; exit code 1 where a case failed."""
    import json as json_module

    from rich.console import Console

    from ..bench import table
    from ..bench.environment import environment

    facts = {"kind": what, "environment": environment(), "copy_gigabytes_per_second": copy, **more, "results": results}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json_module.dumps(facts, indent=1) + "\n")
    if json:
        print_json(facts)
    else:
        head = f"{facts['environment']['device']}, JAX {facts['environment']['jax']}"
        console = Console(width=None if Console().is_terminal else 200, highlight=False)
        console.print(head if copy is None else f"{head}, a copy moves {copy:.0f} GB/s")
        console.print(table.terminal(what, results))
    if any("failed" in result for result in results):
        raise typer.Exit(1)

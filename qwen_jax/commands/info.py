"""`qwen-jax info`: what a checkpoint is and how it would run."""

from typing import Annotated, Any

import typer

from .common import Debug, Json, Kernels, Model, print_json, status

EXAMPLES = """
qwen-jax info ./Qwen-7B-Chat-Int4
qwen-jax info ./Qwen-7B-Chat-Int4 --chip "NVIDIA H100 80GB HBM3"
qwen-jax info ./Qwen-7B-Chat-Int4 --json | jq .kv_bytes_per_token
"""


def run(
    model: Model,
    chip: Annotated[
        str | None, typer.Option(help="Choose kernels for this device_kind; default: this machine.")
    ] = None,
    kernels: Kernels = "auto",
    dtype: Annotated[str, typer.Option(help="Of activations: float32, bfloat16 or float16.")] = "bfloat16",
    json: Json = False,
    debug: Debug = False,
):
    """Show architecture, quantization, sizes and kernels of a checkpoint, without loading its weights."""
    from ..info import describe

    with status(f"Reading {model}"):
        facts = describe(model, chip=chip, kernels=kernels, dtype=dtype)
    if json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    sections = {
        "Architecture": _architecture(facts["architecture"]),
        "Quantization": _quantization(facts["quantization"]),
        "Bytes in the files": _bytes(facts["bytes"]),
        "KV cache, bytes a token": {width: f"{size:,}" for width, size in facts["kv_bytes_per_token"].items()},
    }
    console.print(facts["folder"], style="bold", soft_wrap=True, highlight=False)
    for title, rows in sections.items():
        console.print(f"\n[bold]{title}[/bold]")
        table = Table(show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
    kernels = facts["kernels"]
    console.print(f"\n[bold]Kernels on {kernels['chip']}, activations {kernels['dtype']}[/bold]")
    table = Table("operation", "weight", "decode", "prefill", box=None)
    for row in kernels["operations"]:
        table.add_row(*row.values())
    console.print(table)
    console.print(f"Layers of a decode step, {kernels['decode_step']}", soft_wrap=True)


def _architecture(config: dict[str, Any]) -> dict[str, str]:
    window = sum(config["sliding_layers"])
    extras = {
        "YaRN": config["yarn"] and f"factor {config['yarn']['factor']:g}",
        "dynamic NTK": config["use_dynamic_ntk"] and f"beyond {config['seq_length']} tokens",
        "log-n attention": config["use_logn_attention"] and f"beyond {config['seq_length']} tokens",
        "sliding window": window and f"{config['sliding_window']} tokens in {window} layers",
        "query and key norms": config["qk_norm"] and "yes",
    }
    return {
        "family": config["family"],
        "layers": str(config["num_layers"]),
        "hidden size, MLP size": f"{config['hidden_size']}, {config['intermediate_size']}",
        "heads": f"{config['num_heads']} query, {config['num_kv_heads']} key/value, of {config['head_dim']}",
        "vocabulary": f"{config['vocab_size']}, head {'tied' if config['tie_word_embeddings'] else 'of its own'}",
        "context": f"{config['max_position_embeddings']} tokens, rope_theta {config['rope_theta']:g}",
        **{name: str(value) for name, value in extras.items() if value},
    }


def _quantization(facts: dict[str, Any] | None) -> dict[str, str]:
    if facts is None:
        return {"none": "float weights"}
    modules, shown = facts["modules"], facts["exceptions"][:8]
    more = len(facts["exceptions"]) - len(shown)
    group = "one group a column" if facts["group_size"] == -1 else f"groups of {facts['group_size']}"
    return {
        "method": f"{facts['method']}, format {facts['format']}",
        "integers": f"{facts['bits']} bits, {group}, {modules} matrices",
        "zero-points": f"{', '.join(facts['zero_points'])}; asymmetric in {facts['asymmetric_modules']} of {modules}",
        "act-order": f"in {facts['act_order_modules']} of {modules}",
        "exceptions": ("\n".join(shown) or "none") + (f"\nand {more} more" if more else ""),
    }


def _bytes(facts: dict[str, int]) -> dict[str, str]:
    share = facts["total"] / facts["total_in_16_bits"]
    rows = {name: f"{size / 1e6:,.1f} MB" for name, size in facts.items() if size and not name.startswith("total")}
    return rows | {"total": f"{facts['total'] / 1e6:,.1f} MB, {share:.0%} of 16-bit weights"}

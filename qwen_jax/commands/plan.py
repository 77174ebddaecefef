"""`qwen-jax plan`: memory of each chip, the speed no program can exceed, and the best mesh, without the machine."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Debug, Json, print_json, progress_bars

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..plan.abstract import Storage

EXAMPLES = """
qwen-jax plan qwen-7b --topology v5e:1x1 --batch 8 --context 2048 --kv int8
qwen-jax plan qwen-72b --topology v5e:2x4 --batch 8 --context 2048 --kv int8 --prompt 512
qwen-jax plan ./Qwen2.5-7B-Instruct-GPTQ-Int4 --topology h100:1 --batch 32 --context 8192 --kv int8
"""


def run(
    model: Annotated[
        str, typer.Argument(help="Dimensions by name (qwen-7b, qwen2.5-72b, …) or a checkpoint's folder.")
    ],
    topology: Annotated[str, typer.Option(help="Chips: v5e:2x4, v5p:2x2x1, v6e:2x2, h100:2, …", metavar="CHIP:SHAPE")],
    batch: Annotated[int, typer.Option(help="Rows.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens a row of the cache holds.", min=1)] = 2048,
    kv: Annotated[str, typer.Option(help="Cache: int8 or bf16.", metavar="int8|bf16")] = "int8",
    bits: Annotated[
        int | None, typer.Option(help="Of the weights: 4, 8 or 16; default: the checkpoint's, or 4.")
    ] = None,
    head_bits: Annotated[int, typer.Option(help="Of the output head: 16, or 8 when rounded.")] = 16,
    mesh: Annotated[
        str | None, typer.Option(help="rows x layers (x length), as 1x8; default: the best.", metavar="DxM[xS]")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Compile prefill of so many tokens a row, too; 0: not.", min=0)] = 0,
    compile: Annotated[bool, typer.Option(help="TPUs: compile the programs and count their memory.")] = True,  # noqa: A002
    json: Json = False,
    debug: Debug = False,
):
    """Plan a model onto chips that need not be here: bytes of each chip, whether it fits, tokens/s at best."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from ..plan import aot
    from ..plan.chips import parse
    from ..plan.plan import plans

    if kv not in ("int8", "bf16"):
        raise ValueError(f"kv={kv!r} is none of ['int8', 'bf16'].")
    chips = parse(topology)
    config, storage = _model(model, bits, head_bits)
    kv_bits = 8 if kv == "int8" else 16
    found = plans(config, storage, chips, batch=batch, context=context, kv_bits=kv_bits)
    best = found[0]
    if mesh is not None:
        wanted = mesh.lower()
        wanted = wanted.removesuffix("x1") if wanted.count("x") == 2 else wanted
        best = next((plan for plan in found if plan.mesh == wanted), None)
        if best is None:
            names = [plan.mesh for plan in found]
            raise ValueError(f"mesh={mesh!r} is none of {names}, the meshes of {chips} for {batch} rows.")
    facts: dict[str, Any] = {
        "model": model,
        "topology": str(chips),
        "storage": dataclasses.asdict(storage),
        "batch": batch,
        "context": context,
        "kv_bits": kv_bits,
        "best": dataclasses.asdict(best) | {"mesh": best.mesh},
        "meshes": [dataclasses.asdict(plan) | {"mesh": plan.mesh} for plan in found],
    }
    programs: dict[str, Any] = {}
    facts["programs"] = programs
    if chips.chip.platform != "tpu":
        facts["note"] = "arithmetic alone: programs are compiled ahead of time for TPUs only"
    elif not compile:
        facts["note"] = "arithmetic alone, as asked"
    elif reason := aot.missing():
        facts["note"] = f"arithmetic alone: {reason}"
    else:
        steps: dict[str, int | None] = {"decode": None} | ({f"prefill of {prompt}": prompt} if prompt else {})
        with progress_bars() as update:
            for done, (name, tokens) in enumerate(steps.items()):
                update(f"Compiling for {chips}", done, len(steps), unit="programs", note=name)
                compiled = aot.compile_step(
                    config,
                    storage,
                    aot.mesh_of(chips, best.data, best.model, best.sequence),
                    chips.chip.kind,
                    batch=batch,
                    context=context,
                    kv_bits=kv_bits,
                    prompt=tokens,
                )
                programs[name] = dataclasses.asdict(compiled) | {"fits": aot.fits(compiled, chips)}
                update(f"Compiling for {chips}", done + 1, len(steps), unit="programs", note=name)
    if json:
        print_json(facts)
    else:
        _print(facts)


def _model(name: str, bits: int | None, head_bits: int) -> tuple["ModelConfig", "Storage"]:
    from ..bench.models import MODELS
    from ..config import ModelConfig, QuantizationConfig
    from ..plan.abstract import Storage

    if name in MODELS:
        config, storage = MODELS[name], Storage(bits=bits or 4, head_bits=head_bits)
    else:
        from ..checkpoint_store import find

        folder = find(name)
        config, quantization = ModelConfig.from_folder(folder), QuantizationConfig.from_folder(folder)
        storage = Storage(bits=bits or 16, head_bits=head_bits)
        if quantization is not None and bits in (None, quantization.bits):
            storage = Storage(quantization.bits, quantization.group_size, not quantization.sym, head_bits=head_bits)
    for what, value, allowed in (("bits", storage.bits, (4, 8, 16)), ("head_bits", head_bits, (8, 16))):
        if value not in allowed:
            raise ValueError(f"{what}={value} is none of {list(allowed)}.")
    return config, storage


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]{facts['model']}[/bold], {facts['storage']['bits']}-bit weights, {facts['kv_bits']}-bit cache, "
        f"{facts['batch']} rows of {facts['context']} tokens on {facts['topology']}",
        highlight=False,
    )
    table = Table("mesh", "weights", "cache", "of GB", "fits", "read", "compute", "reduce ms", "tokens/s ≤", box=None)
    for plan in facts["meshes"]:
        chosen = "→ " if plan == facts["best"] else "  "
        table.add_row(
            chosen + plan["mesh"],
            *(f"{plan[name] / 1e9:.2f}" for name in ("weights", "cache", "memory")),
            "yes" if plan["fits"] else "no",
            *(f"{plan[f'{name}_seconds'] * 1e3:.2f}" for name in ("read", "compute", "reduce")),
            f"{plan['tokens_per_second']:.0f}",
        )
    console.print(table)
    for name, program in facts["programs"].items():
        copies = ", ".join(f"{what} ({size / 1e6:.0f} MB)" for what, size in program["copies"]) or "none"
        verdict = "fits" if program["fits"] else "does not fit"
        console.print(
            f"compiled {name}: {program['arguments'] / 1e9:.2f} GB of arguments + "
            f"{program['temporaries'] / 1e9:.2f} GB of temporaries a chip, {verdict}; "
            f"copies of weights or cache: {copies}",
            highlight=False,
        )
    if "note" in facts:
        console.print(facts["note"], highlight=False)

"""`qwen-jax bench matmul` and `attention`: one operation by itself; `report`: results drawn."""

from pathlib import Path
from typing import Annotated

import typer

from .bench_output import Batch, Bits, Context, Dtype, KvBits, Output, check_values, finish, resolve
from .common import Debug, Json, Kernels, status

MatmulModel = Annotated[list[str] | None, typer.Option(help="Take the four matmuls of this model, as qwen-7b.")]
MatmulShape = Annotated[list[str] | None, typer.Option(help="In x out, as 4096x11008; may be given several times.")]
Rows = Annotated[list[int], typer.Option(help="Of the activations; may be given several times.", min=1)]
GroupSize = Annotated[int, typer.Option(help="Inputs that share a scale; -1 for all.")]
AttentionModel = Annotated[list[str] | None, typer.Option(help="Heads of this model, as qwen-7b; several times.")]
HeadsShape = Annotated[list[str] | None, typer.Option(help="Query heads x key/value heads x channels, as 32x4x128.")]


def matmul(
    model: MatmulModel = None,
    shape: MatmulShape = None,
    rows: Rows = [1, 2, 4, 8, 16, 64, 256, 2048],  # noqa: B006
    bits: Bits = [4],  # noqa: B006
    group_size: GroupSize = 128,
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    output: Output = None,
    json: Json = False,
    debug: Debug = False,
):
    """Time matmuls of packed or 16-bit weights, by default those of five shapes of Qwen 1.8B, 7B and 72B."""
    from pallas_kernels.quantized_matmul import KERNELS

    from ..bench import matmul, processes

    check_values("bits", bits, [4, 8, 16])
    check_values("kernels", [kernels], ["auto", *KERNELS])
    shapes = matmul_shapes(model, shape)
    processes.leave_memory()
    with status("Compiling, then measuring matmuls"):
        copy, results = matmul.measure(
            shapes, rows=rows, bits=bits, group_size=group_size, kernels=kernels, dtype=resolve(dtype)
        )
    finish("matmul", results, copy, output, json)


def matmul_shapes(models: list[str] | None, shapes: list[str] | None) -> list[tuple[int, int]]:
    """What --model and --shape name; without both, the five shapes."""
    from ..bench.matmul import SHAPES, model_shapes, parse_shape
    from ..bench.models import MODELS

    check_values("model", models or [], list(MODELS))
    found = [parse_shape(text) for text in shapes or ()]
    found += [pair for name in models or () for pair in model_shapes(name)]
    return list(dict.fromkeys(found)) or list(SHAPES)


def attention(
    model: AttentionModel = None,
    shape: HeadsShape = None,
    kv_bits: KvBits = [8, 16],  # noqa: B006
    batch: Batch = [1, 8, 32],  # noqa: B006
    context: Context = [2048, 16384],  # noqa: B006
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    output: Output = None,
    json: Json = False,
    debug: Debug = False,
):
    """Time decode attention of one layer over the 8-bit and the 16-bit cache, by default with the heads of qwen-7b."""
    from pallas_kernels.kv_attention.op import KERNELS

    from ..bench import attention, processes

    check_values("kv-bits", kv_bits, [8, 16])
    check_values("kernels", [kernels], ["auto", *KERNELS])
    models = attention_models(model, shape)
    processes.leave_memory()
    with status("Compiling, then measuring attention"):
        copy, results = attention.measure(
            models, batch=batch, context=context, kv_bits=kv_bits, kernels=kernels, dtype=resolve(dtype)
        )
    finish("attention", results, copy, output, json)


def attention_models(models: list[str] | None, shapes: list[str] | None) -> list:
    """(name, dimensions) of what --model and --shape name; without both, qwen-7b."""
    from ..bench.attention import dims_of, parse_shape
    from ..bench.models import MODELS

    check_values("model", models or [], list(MODELS))
    found = [(text, parse_shape(text)) for text in shapes or ()]
    return found + [(name, dims_of(name)) for name in models or (() if shapes else ("qwen-7b",))]


def tune(
    operation: Annotated[str, typer.Option(help="matmul or attention.")] = "matmul",
    model: Annotated[list[str] | None, typer.Option(help="Shapes of this model, as qwen-7b; several times.")] = None,
    shape: MatmulShape = None,
    rows: Rows = [1, 2, 4, 8, 16, 32, 64, 256, 2048],  # noqa: B006
    bits: Annotated[list[int], typer.Option(help="Of the weights: 4 or 8; several times.")] = [4],  # noqa: B006
    kv_bits: KvBits = [8, 16],  # noqa: B006
    batch: Batch = [1, 8, 32],  # noqa: B006
    context: Context = [2048],  # noqa: B006
    table: Annotated[
        Path | None, typer.Option(help="Write here, not into the installed table that kernels load.")
    ] = None,
    output: Output = None,
    json: Json = False,
    debug: Debug = False,
):
    """Search block sizes for this GPU and write the table that the kernels load; shapes not searched compute theirs."""
    from ..bench import processes, tune

    check_values("operation", [operation], ["matmul", "attention"])
    check_values("bits", bits, [4, 8])
    check_values("kv-bits", kv_bits, [8, 16])
    processes.leave_memory()
    with status(f"Timing candidates of {operation}"):
        if operation == "matmul":
            shapes = matmul_shapes(model, shape)
            path, copy, results = tune.tune_matmul(shapes, rows=rows, bits=bits, output=table)
        else:
            models = attention_models(model, shape)
            options = dict(kv_bits=kv_bits, batch=batch, context=context)
            path, copy, results = tune.tune_attention(models, **options, output=table)
    typer.echo(f"Written: {path}", err=json)
    finish(operation, results, copy, output, json)


def report(
    file: Annotated[list[Path], typer.Argument(help="What other commands wrote with --output.")],
    output: Annotated[Path, typer.Option(help="Folder for report.md and its figures.")] = Path("report"),
    debug: Debug = False,
):
    """Draw results: a page of Markdown and figures as PNG (roofline, peers, attention, decode)."""
    from ..bench import report

    sets, failed = report.read(file)
    with status("Drawing"):
        from ..plots.bench import TITLES, figures

        output.mkdir(parents=True, exist_ok=True)
        names = {}
        for name, drawing in figures(sets).items():
            drawing.savefig(output / f"{name}.png", dpi=150)
            names[TITLES[name]] = f"{name}.png"
    page = output / "report.md"
    page.write_text(report.markdown(sets, failed, names), encoding="utf-8")
    typer.echo(f"{page}, with {', '.join(names.values()) or 'no figure'}")

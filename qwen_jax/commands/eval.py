"""`qwen-jax eval`: perplexity of a text, what quantization changed, and lm-eval's tasks."""

import dataclasses
import importlib.util
import pathlib
import textwrap
import time
from typing import Annotated

import typer

from . import common
from .common import Debug, Dtype, Json, Kernels, Kv8, Model, print_json

EXAMPLES = """
qwen-jax eval ./int4 --text book.txt
qwen-jax eval ./float --text book.txt --limit 8192 --compare ./int8 --compare ./int4 --kv8 --plot compared.png
qwen-jax eval ./int4 --task mmlu --task gsm8k --fewshot 5
qwen-jax eval ./int4 --task mine --include-path ./tasks --chat-template
"""


def run(
    model: Model,
    text: Annotated[pathlib.Path | None, typer.Option(help="A UTF-8 text file.", metavar="FILE")] = None,
    window: Annotated[int, typer.Option(help="Tokens that go through the model at once.", min=2)] = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: they do not overlap.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many tokens, or questions of a task.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="A model to hold against MODEL, the float one; repeatable.", metavar="MODEL"),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-eval; repeatable.", metavar="NAME")] = None,
    include_path: Annotated[
        pathlib.Path | None, typer.Option(help="Tasks from YAML files in this folder, and no others.", metavar="DIR")
    ] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before a question.", min=0)] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask tasks as a chat.")] = False,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="Run code that the model writes (HumanEval) on this machine.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Rows at once in tasks.", min=1)] = None,
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="With --compare: also draw size, perplexity, speed.", metavar="PNG")
    ] = None,
    kv8: Kv8 = False,
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    json: Json = False,
    debug: Debug = False,
):
    """Measure the perplexity of a text; with --compare also how far quantized models are from the float one.

    With --kv8 predictions come from the 8-bit KV cache, token by token, which takes long; with --compare each model is
    then measured both ways. Tasks need the package lm-eval: pip install "qwen-jax[eval]".
    """
    from ..checkpoint_store import find
    from ..evaluate.compare import compare as compare_models
    from ..evaluate.perplexity import perplexity
    from ..tokenizer import AutoTokenizer

    if (text is None) == (not task):
        raise ValueError("Give one of --text FILE and --task NAME.")
    if task:
        loaded, tokenizer = common.load(model, dtype=dtype, kernels=kernels, use_cache_quantization=kv8)
        results = _harness().run_tasks(
            loaded,
            tokenizer,
            task,
            include_path=None if include_path is None else str(include_path),
            num_fewshot=fewshot,
            limit=limit,
            chat_template=chat_template,
            unsafe_code=unsafe_code,
            batch_size=batch_size,
        )
        _tasks(model, results, json)
        return
    assert text is not None

    tokenizer = AutoTokenizer.from_pretrained(str(find(model)))
    try:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    ids = ids[:limit]
    start = time.perf_counter()
    if plot is not None and not compare:
        raise ValueError("--plot: draws a comparison; give --compare MODEL.")
    if compare:
        if stride is not None:
            raise ValueError("--stride: with --compare windows do not overlap; leave it out.")
        kinds = ("float", "8-bit") if kv8 else ("float",)
        with common.progress_bars(announce=True) as update:
            rows = compare_models(
                model,
                compare,
                ids,
                window=window,
                kv_cache=kinds,
                dtype=dtype,
                use=True,
                progress=lambda step, done, total: update(step, done, total),
            )
        if plot is not None:
            _plot(rows, text, plot)
        if json:
            print_json({"text": str(text), "window": window, "rows": [dataclasses.asdict(row) for row in rows]})
        else:
            _table(rows)
        return
    loaded, _ = common.load(model, dtype=dtype, kernels=kernels, use_cache_quantization=kv8)
    with common.progress_bars() as update:

        def progress(done: int, total: int) -> None:
            update("Measuring", done, total, unit="tokens")

        value = perplexity(loaded, ids, window, stride, through_cache=kv8, progress=progress)
    seconds = time.perf_counter() - start
    if json:
        print_json({"model": model, "text": str(text), "tokens": len(ids), "perplexity": value, "seconds": seconds})
    else:
        print(f"perplexity {value:.3f} over {len(ids)} tokens in {seconds:.1f} s")


def _harness():
    """The adapter, or an error that says how to install what it needs."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('--task: the package lm-eval is not installed; pip install "qwen-jax[eval]".')
    from ..evaluate import harness

    return harness


def _tasks(model: str, results: dict, json: bool) -> None:
    numbers = {
        task: {name.partition(",")[0]: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results.items()
    }
    if json:
        print_json({"model": model, "tasks": numbers})
        return
    for task, metrics in numbers.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def _plot(rows, text: pathlib.Path, file: pathlib.Path) -> None:
    from ..bench.environment import environment
    from ..plots import quantization

    facts = environment()
    drawing = quantization(
        ["\n".join(textwrap.wrap(f"{pathlib.Path(row.model).name}, {row.kv_cache} cache", 28)) for row in rows],
        [row.weight_bytes for row in rows],
        [row.perplexity for row in rows],
        [row.tokens_per_second for row in rows],
        f"{text.name}; {facts['device']}, JAX {facts['jax']}, {facts['date']}",
    )
    drawing.savefig(file, dpi=150)


def _table(rows) -> None:
    from rich.console import Console
    from rich.table import Table

    exact = rows[0].perplexity
    table = Table(box=None)
    columns = ("model", "KV cache", "MB", "peak MB", "tokens/s", "perplexity", "", "KL divergence", "same top token")
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "KV cache") else "right")
    for row in rows:
        table.add_row(
            pathlib.Path(row.model).name,
            row.kv_cache,
            f"{row.weight_bytes / 1e6:.1f}",
            "not measured" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity / exact - 1:+.2%}",
            f"{row.kl_divergence:.5f}",
            f"{row.top1_agreement:.2%}",
        )
    console = Console()
    console.width = console.width if console.is_terminal else 200
    console.print(table)

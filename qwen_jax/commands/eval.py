"""`qwen-jax eval`: perplexity of a text, and what quantization changed."""

import dataclasses
import pathlib
import sys
import time
from typing import Annotated

import typer

from .common import Debug, Dtype, Json, Kernels, Kv8, Model, print_json

EXAMPLES = """
qwen-jax eval ./int4 --text book.txt
qwen-jax eval ./float --text book.txt --limit 8192 --compare ./int8 --compare ./int4
"""


def run(
    model: Model,
    text: Annotated[pathlib.Path, typer.Option(help="A UTF-8 text file.", metavar="FILE")],
    window: Annotated[int, typer.Option(help="Tokens that go through the model at once.", min=2)] = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: they do not overlap.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many tokens.", min=2)] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="A model to hold against MODEL, the float one; repeatable.", metavar="MODEL"),
    ] = None,
    kv8: Kv8 = False,
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    json: Json = False,
    debug: Debug = False,
):
    """Measure the perplexity of a text; with --compare also how far quantized models are from the float one.

    With --kv8 predictions come from the 8-bit KV cache, token by token, which takes long; with --compare each model is
    then measured both ways.
    """
    from ..causal_lm import QwenForCausalLM
    from ..checkpoint_store import find
    from ..evaluate.compare import compare as compare_models
    from ..evaluate.perplexity import perplexity
    from ..tokenizer import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(find(model)))
    try:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    ids = ids[:limit]
    start = time.perf_counter()
    if compare:
        if stride is not None:
            raise ValueError("--stride: with --compare windows do not overlap; leave it out.")
        kinds = ("float", "8-bit") if kv8 else ("float",)
        rows = compare_models(
            model,
            compare,
            ids,
            window=window,
            kv_cache=kinds,
            dtype=dtype,
            progress=lambda note: print(note, file=sys.stderr),
        )
        if json:
            print_json({"text": str(text), "window": window, "rows": [dataclasses.asdict(row) for row in rows]})
        else:
            _table(rows)
        return
    loaded = QwenForCausalLM.from_pretrained(model, dtype=dtype, kernels=kernels, use_cache_quantization=kv8)
    value = perplexity(loaded, ids, window, stride, through_cache=kv8)
    seconds = time.perf_counter() - start
    if json:
        print_json({"model": model, "text": str(text), "tokens": len(ids), "perplexity": value, "seconds": seconds})
    else:
        print(f"perplexity {value:.3f} over {len(ids)} tokens in {seconds:.1f} s")


def _table(rows) -> None:
    from rich.console import Console
    from rich.table import Table

    exact = rows[0].perplexity
    table = Table()
    for name in ("model", "KV cache", "MB", "perplexity", "", "KL divergence", "same top token"):
        table.add_column(name, justify="left" if name in ("model", "KV cache") else "right")
    for row in rows:
        table.add_row(
            row.model,
            row.kv_cache,
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity / exact - 1:+.2%}",
            f"{row.kl_divergence:.5f}",
            f"{row.top1_agreement:.2%}",
        )
    Console().print(table)

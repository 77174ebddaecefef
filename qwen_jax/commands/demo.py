"""`qwen-jax demo`: a small real model, quantized here, answers a question."""

import statistics
import sys
import time
from typing import Annotated, Any

import typer

from . import common
from .common import Typewriter, print_json

QUESTION = "Explain in a few sentences how plants turn sunlight into food."
EXAMPLES = """
qwen-jax demo
qwen-jax demo "What is gravity?"
qwen-jax demo --lm-head int8 --json
"""


def run(
    question: Annotated[str, typer.Argument(help="What to ask the model.")] = QUESTION,
    max_new_tokens: common.MaxNewTokens = 200,
    temperature: common.Temperature = 0,
    top_p: common.TopP = None,
    top_k: common.TopK = None,
    repetition_penalty: common.RepetitionPenalty = 1.05,
    seed: common.Seed = 0,
    kv8: common.Kv8 = True,
    dtype: common.Dtype = "auto",
    kernels: common.Kernels = "auto",
    lm_head: common.LmHead = None,
    json: common.Json = False,
    debug: common.Debug = False,
):
    """Quantize SmolLM2-135M to Int4, chat with it, and show how fast it was and what ran.

    The first run writes the checkpoint into the user's cache folder ($QWEN_JAX_CACHE) and compiles the programs; later
    runs find both there.
    """
    from ..demo.checkpoints import demo_checkpoints
    from ..info import describe
    from ..memory import device_peak, host_peak, reset_host_peak

    with common.progress_bars(announce=True) as progress:
        checkpoints = demo_checkpoints(progress)
    reset_host_peak()
    start = time.perf_counter()
    model, tokenizer = common.load(
        checkpoints.converted, use_cache_quantization=kv8, dtype=dtype, kernels=kernels, lm_head=lm_head
    )
    load_seconds = time.perf_counter() - start
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    sampling = common.sampling_arguments(temperature, top_p, top_k, repetition_penalty)
    if not json:
        print(f"\n> {question}\n")
    typewriter = Typewriter(None if json else sys.stdout)
    answer, timing = _answer(model, tokenizer, ids, typewriter, max_new_tokens=max_new_tokens, seed=seed, **sampling)
    facts = describe(checkpoints.quantized, kernels=kernels, dtype=model.dtype)
    result = {
        "question": question,
        "answer": answer,
        **timing,
        "load_seconds": round(load_seconds, 2),
        "peak_host_bytes": host_peak(),
        "peak_device_bytes": device_peak(),
        "checkpoint_bytes": facts["bytes"]["total"],
        "checkpoint_bytes_in_bf16": facts["bytes"]["total_in_16_bits"],
        "kv_cache": "8-bit" if kv8 else model.dtype,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "kernels": facts["kernels"],
        "lm_head": lm_head or "as in the checkpoint",
    }
    if json:
        print_json(result)
    else:
        _print(result)


def _answer(model, tokenizer, ids, typewriter, **settings) -> tuple[str, dict[str, Any]]:
    """Streams the answer; its text, and prefill and decode measured with the programs compiled."""
    from ..text_stream import TextStream

    def stream():
        return model.stream([ids], **settings)

    text, tokens, times = TextStream(tokenizer, stop_token_ids=tokenizer.stop_token_ids), [], []
    start = time.perf_counter()
    for chunk in stream():
        new = chunk.tokens_BN[0][chunk.kept_BN[0]].tolist()
        times.append(time.perf_counter() - start)
        tokens.append(len(new))
        typewriter(text.push(new))
    typewriter(text.finish())
    typewriter.end()
    # The first of each program compiles or is read from disk, so: the median chunk, and the prompt once more. The last
    # chunk may hold fewer tokens than were computed.
    seconds = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    rates = [count / second for count, second in zip(tokens[1:], seconds, strict=True)]
    prefills = []
    for _ in range(3):
        start = time.perf_counter()
        next(stream())
        prefills.append(time.perf_counter() - start)
    return text.text, {
        "prompt_tokens": len(ids),
        "new_tokens": sum(tokens),
        "first_token_seconds": round(times[0], 3),
        "prefill_tokens_per_second": round(len(ids) / statistics.median(prefills), 1),
        "decode_tokens_per_second": round(statistics.median(rates[:-1] or rates), 1) if rates else None,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    megabytes = {name: size / 1e6 for name, size in result.items() if name.endswith(("bytes", "bf16")) and size}
    table = Table(show_header=False, box=None)
    decode = result["decode_tokens_per_second"]
    rows = {
        "prefill": f"{result['prefill_tokens_per_second']} tokens/s ({result['prompt_tokens']} tokens)",
        "decode": f"{decode} tokens/s ({result['new_tokens']} tokens)" if decode else "one token only",
        "first token": f"{result['first_token_seconds']} s after the question, {result['load_seconds']} s to load",
        "peak memory": f"{megabytes['peak_host_bytes']:.0f} MB"
        + (f", on the device {megabytes['peak_device_bytes']:.0f} MB" if "peak_device_bytes" in megabytes else ""),
        "checkpoint": f"{megabytes['checkpoint_bytes']:.1f} MB, in bf16 {megabytes['checkpoint_bytes_in_bf16']:.1f} MB",
        "KV cache": f"{result['kv_cache']}, {result['kv_bytes_per_token']:,} bytes a token",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for names, kernel in _kernels(result).items():
        table.add_row(names, kernel)
    console = Console()
    console.print()
    console.print(table)


def _kernels(result: dict[str, Any]) -> dict[str, str]:
    """What ran: attention over the cache in use, the head with its width, and the layers' matrices by kernel."""
    lines, layers = {}, {}
    for row in result["kernels"]["operations"]:
        name, kernel = row["operation"], f"{row['decode']}; prefill: {row['prefill']}"
        if name == "lm_head":
            width = "8 bits, rounded at load" if result["lm_head"] == "int8" else row["weight"].split("] ")[1]
            lines[name] = f"{width}, {row['decode']}"
        elif name.startswith("attention"):
            if name == f"attention, {result['kv_cache']} cache":
                lines["attention"] = kernel
        else:
            layers.setdefault(f"{row['weight'].split('] ')[1]}, {kernel}", []).append(name)
    return {", ".join(names): kernel for kernel, names in layers.items()} | lines

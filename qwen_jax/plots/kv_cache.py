"""Memory and speed of 16-bit and 8-bit KV caches: upstream's tables beside our arithmetic, and measurements here."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qwen_jax.bench.decode import DecodeResult
from qwen_jax.bench.models import MODELS
from qwen_jax.kv_cache import bytes_per_token
from qwen_jax.plan.abstract import Storage
from qwen_jax.plan.chips import parse
from qwen_jax.plan.plan import estimate
from qwen_jax.plots.published import QWEN_7B_BY_BATCH, QWEN_7B_BY_LENGTH
from qwen_jax.plots.style import BLUE, GREEN, INK, ORANGE, counts, figure, note


def computed_memory(model: str, *, batch: int, length: int, weight_bits: int, kv_bits: int) -> float:
    """GB of weights and a full cache on one device, exactly counted; activations and workspaces come on top.

    Args:
        model: a name in `qwen_jax.bench.models.MODELS`.
        batch: rows of the cache.
        length: tokens a row.
        weight_bits: 16, 8 or 4.
        kv_bits: 16 or 8.
    """
    storage = Storage(bits=weight_bits)
    plan = estimate(MODELS[model], storage, parse("h100:1"), 1, 1, batch=batch, context=length, kv_bits=kv_bits)
    return (plan.weights + plan.cache) / 1e9


def published_cache_memory() -> Figure:
    """Upstream's two tables of Qwen-7B's memory, and what the same takes here, by arithmetic."""
    lines = (("16-bit", 16, 16, BLUE, "s"), ("8-bit", 16, 8, ORANGE, "o"))
    with figure(2, width=9.5, height=4.4) as (drawing, axes):
        by_batch, by_length = axes
        for name, weight_bits, kv_bits, color, marker in lines:
            for axis, table, xs in (
                (by_batch, QWEN_7B_BY_BATCH, QWEN_7B_BY_BATCH["batch"]),
                (by_length, QWEN_7B_BY_LENGTH, QWEN_7B_BY_LENGTH["length"]),
            ):
                ours = [_at(axis is by_batch, x, weight_bits, kv_bits) for x in xs]
                theirs = [(x, value) for x, value in zip(xs, table[name], strict=True) if value is not None]
                axis.plot(*zip(*theirs, strict=True), "--", marker=marker, color=color, mfc="white", alpha=0.75)
                axis.plot(xs, ours, marker=marker, color=color)
        for axis, xs in ((by_batch, QWEN_7B_BY_BATCH["batch"]), (by_length, QWEN_7B_BY_LENGTH["length"])):
            axis.plot(xs, [_at(axis is by_batch, x, 4, 8) for x in xs], marker="D", color=GREEN)
            axis.set_ylabel("memory, GB")
        by_batch.axhline(80, color=INK, linewidth=1, linestyle=":")
        by_batch.annotate("an 80 GB card", (1, 80), xytext=(0, 3), textcoords="offset points", fontsize=8)
        by_batch.set(title="Qwen-7B by batch, 1024 tokens", ylim=(0, 92))
        by_length.set(title="Qwen-7B by length, batch 1", ylim=(0, 26))
        counts(by_batch, QWEN_7B_BY_BATCH["batch"], "rows of the batch")
        counts(by_length, QWEN_7B_BY_LENGTH["length"], "tokens in the cache")
        legend: dict[str, Any] = {
            "upstream, measured: BF16 weights, 16-bit cache": ("s", BLUE, "--", "white"),
            "upstream, measured: BF16 weights, 8-bit cache": ("o", ORANGE, "--", "white"),
            "": ("", "none", "", "none"),
            "ours, computed: BF16 weights, 16-bit cache": ("s", BLUE, "-", BLUE),
            "ours, computed: BF16 weights, 8-bit cache": ("o", ORANGE, "-", ORANGE),
            "ours, computed: Int4 weights, 8-bit cache": ("D", GREEN, "-", GREEN),
        }
        handles = [
            Line2D([], [], marker=marker, color=color, linestyle=style, mfc=fill)
            for marker, color, style, fill in legend.values()
        ]
        drawing.legend(handles, list(legend), loc="outside upper left", ncols=2)
        note(
            drawing,
            "Upstream: Qwen's README, A100 80 GB, the whole process; where its lines end, memory ran out. "
            "Ours: weights and cache alone, counted exactly; not measured.",
        )
    return drawing


def _at(by_batch: bool, x: int, weight_bits: int, kv_bits: int) -> float:
    batch, length = (x, 1024) if by_batch else (1, x)
    return computed_memory("qwen-7b", batch=batch, length=length, weight_bits=weight_bits, kv_bits=kv_bits)


def cache_measurements(model, results: Sequence[DecodeResult], source: str) -> Figure:
    """Four panels: bytes of the cache, and decoding speed, against batch and against length.

    Args:
        model: the `QwenForCausalLM` that was measured; its config says what a token takes.
        results: of `qwen_jax.bench.decode.measure`, with `kv_bits` 8, or anything else for a cache in the model's
            dtype. The smallest batch and the commonest length are those of the other axis.
        source: device, model and date, for the small print.
    """
    batches, lengths = sorted({r.batch for r in results}), [r.context for r in results]
    fixed_batch, fixed_length = batches[0], max(lengths, key=lengths.count)
    names = {False: f"{model.dtype} cache", True: "8-bit cache"}
    with figure(2, 2, height=5.8) as (drawing, axes):
        (memory_batch, memory_length), (speed_batch, speed_length) = axes
        for quantized, color, marker in ((False, BLUE, "s"), (True, ORANGE, "o")):
            own = [r for r in results if (r.kv_bits == 8) == quantized]
            token = bytes_per_token(model.config, model.dtype, quantized)
            by_batch = sorted((r for r in own if r.context == fixed_length), key=lambda r: r.batch)
            by_length = sorted((r for r in own if r.batch == fixed_batch), key=lambda r: r.context)
            line: Any = {"color": color, "marker": marker, "label": names[quantized]}
            for axis, part, x in (
                (memory_batch, by_batch, "batch"),
                (memory_length, by_length, "context"),
            ):
                axis.plot([getattr(r, x) for r in part], [token * r.batch * r.context / 1e6 for r in part], **line)
            for axis, part, x in ((speed_batch, by_batch, "batch"), (speed_length, by_length, "context")):
                xs = [getattr(r, x) for r in part]
                best = [r.batch / r.step_ms_fastest * 1e3 for r in part]
                axis.plot(xs, best, **line)
                axis.fill_between(xs, [r.tokens_per_second for r in part], best, color=color, alpha=0.15, linewidth=0)
        _finish(memory_batch, f"Cache of {fixed_length:,} tokens a row", "MB", batches, "rows of the batch")
        _finish(memory_length, f"Cache of batch {fixed_batch}", "MB", set(lengths), "tokens in the cache")
        _finish(speed_batch, "Speed of all rows", "decode, tokens/s", batches, "rows of the batch")
        _finish(speed_length, f"Speed of batch {fixed_batch}", "decode, tokens/s", set(lengths), "tokens in the cache")
        memory_batch.legend()
        note(
            drawing,
            f"{source}. Lines: the fastest round, least disturbed by other work; bands: from there to the median.",
        )
    return drawing


def _finish(axis: Axes, title: str, label: str, values, values_label: str) -> None:
    axis.set(title=title, ylabel=label)
    axis.set_ylim(bottom=0)
    counts(axis, values, values_label)

"""What quantization costs and gains: size, perplexity and speed of one model in several widths."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from qwen_jax.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, figure, note


def quantization(
    names: Sequence[str],
    bytes_of_weights: Sequence[float],
    perplexities: Sequence[float],
    tokens_per_second: Sequence[float],
    source: str,
) -> Figure:
    """Three panels of bars, a bar a model; the first model is the float one that others are compared with.

    Args:
        names: of the models, as they are called in the figure.
        bytes_of_weights: of each checkpoint.
        perplexities: lower is better.
        tokens_per_second: of decoding.
        source: text, device and date, for the small print.
    """
    panels = (
        ("Size", "weights, MB", [size / 1e6 for size in bytes_of_weights], "{:.0f}"),
        ("Perplexity", "perplexity, lower is better", perplexities, "{:.2f}"),
        ("Speed", "decode, tokens/s", tokens_per_second, "{:.0f}"),
    )
    colors = [GREY, BLUE, ORANGE, GREEN, PURPLE, RED]
    with figure(3, height=0.5 * len(names) + 1.5) as (drawing, axes):
        for axis, (title, label, values, form) in zip(axes, panels, strict=True):
            bars = axis.barh(range(len(names)), values, color=colors[: len(names)], height=0.62)
            ratios = ["", *(f"  ({value / values[0]:.2f}×)" for value in values[1:])]
            axis.bar_label(bars, [form.format(v) + r for v, r in zip(values, ratios, strict=True)], padding=3)
            axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
            axis.invert_yaxis()
            axis.set(title=title, xlabel=label, xlim=(0, max(values) * 1.6))
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="y", visible=False)
        note(drawing, source)
    return drawing

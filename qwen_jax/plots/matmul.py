"""How a packed matmul works and how close to the card's limits it runs."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qwen_jax.plan.chips import CHIPS
from qwen_jax.plots.published import CUBLAS_MICROSECONDS, CUBLAS_SHAPE
from qwen_jax.plots.results import read_results
from qwen_jax.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, figure, note

COPY_BANDWIDTH = 2.82e12  # bytes/s of a device-to-device copy measured from JAX on the H100


def packed_word(word: int, first_row: int = 0) -> Figure:
    """One int32 of a GPTQ file's `qweight` as its 32 bits, and the eight 4-bit integers in them.

    Args:
        word: any int32.
        first_row: the matrix row that its lowest four bits belong to.
    """
    bits = [int(word) >> place & 1 for place in range(32)]
    colors = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY, INK]
    with figure(height=1.75) as (drawing, axis):
        for nibble in range(8):
            color, left = colors[nibble], 28 - 4 * nibble
            value = sum(bits[4 * nibble + place] << place for place in range(4))
            axis.add_patch(Rectangle((left, 0), 4, 1, facecolor=color, alpha=0.22, edgecolor="white", linewidth=2))
            for place in range(4):
                axis.text(
                    left + 3.5 - place, 0.5, bits[4 * nibble + place], ha="center", va="center", family="monospace"
                )
            axis.text(left + 2, 1.28, f"q = {value}", ha="center", va="center", weight="bold")
            axis.text(left + 2, -0.3, f"row {first_row + nibble}", ha="center", va="center", fontsize=9)
        axis.set(xlim=(-0.2, 32.2), ylim=(-0.6, 1.6), title=f"One int32 holds eight rows of one column: {int(word)}")
        axis.axis("off")
    return drawing


def roofline(results: str = "h100_quantized_matmul") -> Figure:
    """Arithmetic done in a second against operations for each byte read, under the limits of an H100.

    Left of the ridge memory is the limit: four times fewer bytes are up to four times more speed. Right of it the
    tensor cores are.

    Args:
        results: name of the measurements under `benchmarks/results`.
    """
    measured, chip = read_results(results), CHIPS["h100"]
    best: dict[tuple[int, int], dict[int, float]] = {}
    for entry in measured["entries"]:
        if entry["bits"] == 4 and entry["error"] < 0.01:
            rows = best.setdefault((entry["in"], entry["out"]), {})
            rows[entry["rows"]] = min(entry["us"], rows.get(entry["rows"], np.inf))
    with figure(height=5.0) as (drawing, axis):
        intensity = np.geomspace(1, 6000, 200)
        limit = np.minimum(chip.flops, chip.bandwidth * intensity)
        axis.plot(
            intensity,
            limit / 1e12,
            color=INK,
            label=f"limit: {chip.bandwidth / 1e12:.2f} TB/s, then {chip.flops / 1e12:.0f} TFLOP/s in bfloat16",
        )
        copy = COPY_BANDWIDTH * intensity
        axis.plot(
            intensity[copy < chip.flops],
            copy[copy < chip.flops] / 1e12,
            ":",
            color=INK,
            label=f"a copy's {COPY_BANDWIDTH / 1e12:.2f} TB/s, measured",
        )
        points = [_point(*CUBLAS_SHAPE, rows, us, 2.0) for rows, us in CUBLAS_MICROSECONDS.items()]
        label = f"16-bit weights, {CUBLAS_SHAPE[0]} × {CUBLAS_SHAPE[1]}, cuBLAS"
        axis.plot(*zip(*points, strict=True), "X--", color=GREY, linewidth=1, label=label)
        axis.annotate("1 row", points[0], xytext=(6, -12), textcoords="offset points", fontsize=8, color=GREY)
        shapes = zip(sorted(best.items()), [BLUE, ORANGE, GREEN, RED, PURPLE], "osD^v", strict=False)
        for ((inputs, outputs), rows), color, marker in shapes:
            points = [_point(inputs, outputs, count, us, 0.5 + 2 / 128) for count, us in sorted(rows.items())]
            axis.plot(*zip(*points, strict=True), marker=marker, color=color, label=f"Int4, {inputs} × {outputs}")
            if (inputs, outputs) == CUBLAS_SHAPE:
                for count, (x, y) in zip(sorted(rows), points, strict=True):
                    words = "1 row" if count == 1 else f"{count} rows"
                    axis.annotate(words, (x, y), xytext=(6, -12), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", yscale="log", xlim=(0.8, 6000), ylim=(0.8, 1500))
        axis.set(xlabel="arithmetic intensity, FLOP per byte of memory traffic", ylabel="TFLOP/s")
        axis.set_title("Int4 matmul under an H100's roofline")
        axis.legend(loc="lower right")
        note(
            drawing,
            f"Ours: benchmarks/results/{results}.json, {measured['card']}, JAX {measured['jax']}, {measured['date']}; "
            "the fastest tiling of each point.\ncuBLAS: same kind of card, 2026-11-23, another run. Groups of 128.",
        )
    return drawing


def _point(inputs: int, outputs: int, rows: int, microseconds: float, weight_bytes: float) -> tuple[float, float]:
    """(FLOP/byte, TFLOP/s) of a call; x and the result are 16-bit and move once."""
    operations = 2 * inputs * outputs * rows
    moved = inputs * outputs * weight_bytes + 2 * rows * (inputs + outputs)
    return operations / moved, operations / microseconds / 1e6

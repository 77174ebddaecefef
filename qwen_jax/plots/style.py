"""The one look of all figures: colours that colour-blind readers tell apart, light grids, no boxes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/); grey stands for other people's numbers.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, INK = "#7F7F7F", "#222222"

STYLE: Any = {
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.05,
    "figure.constrained_layout.hspace": 0.05,
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextlib.contextmanager
def figure(columns: int = 1, rows: int = 1, *, width: float = 9.0, height: float = 3.4) -> Iterator[tuple[Figure, Any]]:
    """A figure in the shared style and its axes (as `plt.subplots`), closed at the block's end.

    Args:
        columns: axes side by side.
        rows: axes one above the other.
        width: of the figure, in inches.
        height: likewise.
    """
    with plt.rc_context(STYLE):
        drawing, axes = plt.subplots(rows, columns, figsize=(width, height))
        try:
            yield drawing, axes
            drawing.canvas.draw()  # lays out in this style, not in that of the time it is shown
        finally:
            plt.close(drawing)


def note(drawing: Figure, text: str) -> None:
    """A line of small print under everything: where numbers come from."""
    drawing.supxlabel(text, x=0.01, ha="left", fontsize=8, color=GREY)


def counts(axis: Axes, values, label: str) -> None:
    """A logarithmic x axis in powers of two whose ticks are `values`, written as numbers."""
    axis.set_xscale("log", base=2)
    values = sorted(set(values))
    axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.minorticks_off()
    axis.set_xlabel(label)

"""Draws the figures of docs/benchmarks.md from benchmarks/results; run it after a result has changed (make figures).

Each SVG names the digest of the file it was drawn from, which a test compares.
"""

import hashlib
import io
import json
import pathlib
import re

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from qwen_jax.plots import bench

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
OURS, PEER = "#5e35b1", "#9e9e9e"


def rows(file: pathlib.Path) -> list[list[str]]:
    """The cells of every table row of a Markdown file."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def number(cell: str) -> float | None:
    """The number of a cell that begins with one."""
    found = re.match(r"[\d.]+(?= |$|\()", cell)
    return float(found[0]) if found else None


def peers(file: pathlib.Path) -> plt.Figure:
    """As `qwen-jax bench report` draws it: µs by rows for each shape."""
    return bench.peers(json.loads(file.read_text(encoding="utf-8"))["sets"])


def cpu(file: pathlib.Path) -> plt.Figure:
    """Decode tokens/s of the first table, with the range of the rounds."""
    found = []
    for name, _, _, decode, _ in (cells for cells in rows(file) if len(cells) == 5 and "(" in cells[3]):
        median, low, high = (float(text) for text in re.findall(r"[\d.]+", decode))
        found.append((name.replace("`", "").replace(" (the checkpoint's own)", ""), median, low, high))
    figure, axes = plt.subplots(figsize=(8, 1.9))
    for position, (name, median, low, high) in enumerate(found[:3]):
        error = [[median - low], [high - median]]
        axes.barh(position, median, 0.6, xerr=error, color=PEER if name.startswith("llama") else OURS, capsize=3)
        axes.text(4, position, f"{median:.0f}", va="center", color="white", fontsize=9)
    axes.set_yticks(range(3), [name for name, *_ in found[:3]], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, SmolLM2-135M on two CPU cores (more is better)")
    return figure


def quantization(file: pathlib.Path) -> plt.Figure:
    """Perplexity of 4 bits by option."""
    found = []
    for cells in rows(file):
        if len(cells) == 10 and cells[0] == "4":
            words = [cells[2], "scales " + cells[3].replace("extremes", "from extremes")]
            words += ["propagation"] * (cells[4] == "1") + ["asymmetric"] * (cells[1] == "asymmetric")
            found.append((", ".join([*words, f"{cells[5]} rows"]), float(cells[6])))
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(found) + 0.9))
    exact = float(re.search(r"(\d+\.\d+) in float", file.read_text(encoding="utf-8"))[1])
    for position, (_, value) in enumerate(found):
        axes.barh(position, value - exact, 0.6, left=exact, color=OURS)
        axes.text(value + 0.03, position, f"{value:.2f}", va="center", fontsize=8)
    axes.axvline(exact, color="black", linewidth=1.5)
    axes.set_yticks(range(len(found)), [name for name, _ in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"perplexity of SmolLM2-135M in Int4; the line is float, {exact} (less is better)")
    return figure


def two_cards(file: pathlib.Path) -> plt.Figure:
    """How many times as fast two cards are, with the least that was asked for."""
    found = []
    for cells in rows(file):
        times = number(cells[4]) if len(cells) == 6 else None
        if times is not None and not re.search("second call|withdrawn", cells[0]):
            least = re.match(r"([\d.]+) / ", cells[5])
            found.append((cells[0].split(" (")[0], times, float(least[1]) if least else None))
    figure, axes = plt.subplots(figsize=(8, 0.38 * len(found) + 0.9))
    for position, (_, times, least) in enumerate(found):
        axes.barh(position, times, 0.6, color=OURS)
        axes.text(times + 0.02, position, f"{times:.2f}", va="center", fontsize=8)
        if least is not None:
            axes.plot([least, least], [position - 0.38, position + 0.38], color="black", linewidth=1.5)
    axes.plot([], [], color="black", linewidth=1.5, label="asked for")
    axes.set_xlim(1, 2.05)
    axes.set_yticks(range(len(found)), [name for name, *_ in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("two H200 over one, times as fast (2 is all there is)")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


SOURCES = {
    "h200_peers": (peers, "h200_bench.json"),
    "cpu_decode": (cpu, "cpu_llama_cpp.md"),
    "quantization": (quantization, "quantization_smollm2.md"),
    "two_cards": (two_cards, "two_h200.md"),
}


def mark(file: pathlib.Path) -> str:
    """The comment that ties a figure to its numbers."""
    return f"<!-- drawn from {file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()} -->"


def main() -> None:
    """Draws all figures."""
    plt.rcParams |= {"svg.hashsalt": "qwen-jax", "svg.fonttype": "path", "axes.spines.top": False}
    plt.rcParams |= {"axes.spines.right": False, "font.size": 9}
    FIGURES.mkdir(exist_ok=True)
    for name, (draw, source) in SOURCES.items():
        figure, text = draw(RESULTS / source), io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        (FIGURES / f"{name}.svg").write_text("\n".join([*lines, mark(RESULTS / source)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

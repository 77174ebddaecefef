"""Figures of `qwen-jax bench report`: from the results that `qwen_jax.bench.report.read` gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qwen_jax.plan.chips import CHIPS
from qwen_jax.plots.matmul import _point
from qwen_jax.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, counts, figure, note

COLORS, MARKERS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY), "osD^vP"
PEERS = {"cublas": GREY, "tinygemm": SKY, "humming": ORANGE}


TITLES = {
    "roofline": "Matmuls under the roofline",
    "peers": "Int4 matmul and its peers",
    "attention": "Decode attention",
    "decode": "Decoding speed",
}


def figures(sets: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Those that the results have something for, by file name without ending."""
    drawn = {
        "roofline": roofline(sets),
        "peers": peers(sets),
        "attention": attention(sets),
        "decode": decode(sets),
    }
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def _records(sets, kind: str) -> list[dict[str, Any]]:
    return [record for one in sets if one["kind"] == kind for record in one["results"] if "failed" not in record]


def _source(sets, kind: str) -> str:
    facts = next(one["environment"] for one in sets if one["kind"] == kind and "jax" in one["environment"])
    return f"{facts['device']}, JAX {facts['jax']}, {facts['date']}"


def roofline(sets) -> Figure | None:
    """Arithmetic done in a second against operations for each byte read, of each bits and shape."""
    records = [r for r in _records(sets, "matmul") if "peer" not in r and not r["kernel"].startswith("xla")]
    copy = next(
        (
            one["copy_gigabytes_per_second"]
            for one in sets
            if one["kind"] == "matmul" and one.get("copy_gigabytes_per_second")
        ),
        None,
    )
    if not records or copy is None:
        return None
    device = next(
        one["environment"]["device"] for one in sets if one["kind"] == "matmul" and "device" in one["environment"]
    )
    chip = next((known for known in CHIPS.values() if known.kind == device), None)
    with figure(height=5.0) as (drawing, axis):
        intensity = np.geomspace(0.5, 6000, 300)
        limit = copy * 1e9 * intensity
        axis.plot(
            intensity,
            np.minimum(limit, chip.flops if chip else np.inf) / 1e12,
            color=INK,
            label=f"a copy's {copy:.0f} GB/s" + (f", then {chip.flops / 1e12:.0f} TFLOP/s" if chip else ""),
        )
        lines: dict[tuple, list] = {}
        for record in records:
            weight_bytes = record["bytes"] / record["in"] / record["out"]
            point = _point(record["in"], record["out"], record["rows"], record["us"], weight_bytes)
            lines.setdefault((record["bits"], record["in"], record["out"]), []).append(point)
        for number, ((bits, inputs, outputs), points) in enumerate(lines.items()):
            color, marker = COLORS[number % len(COLORS)], MARKERS[number // len(COLORS) % len(MARKERS)]
            axis.plot(
                *zip(*sorted(points), strict=True),
                color=color,
                marker=marker,
                markersize=4,
                label=f"Int{bits}, {inputs} × {outputs}",
            )
        axis.set(xscale="log", yscale="log", title="Matmuls under the roofline")
        axis.set(xlabel="arithmetic intensity, FLOP per byte of memory traffic", ylabel="TFLOP/s")
        axis.legend(loc="lower right", ncols=2, fontsize=8)
        note(drawing, _source(sets, "matmul"))
    return drawing


def peers(sets) -> Figure | None:
    """µs of the Int4 matmul over that of the fastest peer, by rows, a panel a shape."""
    records = _records(sets, "matmul")
    ours = [r for r in records if "peer" not in r and r.get("bits") == 4 and not r["kernel"].startswith("xla")]
    others = [r for r in records if "peer" in r]
    shapes = list(
        dict.fromkeys(
            (r["in"], r["out"]) for r in ours if any(p["in"] == r["in"] and p["out"] == r["out"] for p in others)
        )
    )
    if not shapes:
        return None
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    with figure(columns, rows, width=3.6 * columns, height=3.0 * rows + 0.4) as (drawing, axes):
        axes = np.atleast_1d(axes).ravel()
        for axis in axes[len(shapes) :]:
            axis.axis("off")
        for axis, (inputs, outputs) in zip(axes, shapes, strict=False):
            here = [r for r in others if (r["in"], r["out"]) == (inputs, outputs)]
            for name in dict.fromkeys(r["peer"] for r in here):
                points = sorted((r["rows"], r["us"]) for r in here if r["peer"] == name)
                axis.plot(*zip(*points, strict=True), "x--", color=PEERS.get(name, GREY), label=name, linewidth=1.2)
            points = sorted((r["rows"], r["us"]) for r in ours if (r["in"], r["out"]) == (inputs, outputs))
            axis.plot(*zip(*points, strict=True), "o-", color=BLUE, label="qwen-jax")
            floors = sorted((r["rows"], r["floor_us"]) for r in ours if (r["in"], r["out"]) == (inputs, outputs))
            axis.plot(*zip(*floors, strict=True), ":", color=INK, label="floor")
            axis.set(yscale="log", title=f"{inputs} × {outputs}", ylabel="µs a call")
            counts(axis, [count for count, _ in points], "rows")
            axis.tick_params(axis="x", labelsize=7)
        axes[0].legend(fontsize=8)
        note(drawing, f"Int4, groups of 128; peers on the same card. {_source(sets, 'matmul')}")
    return drawing


def attention(sets) -> Figure | None:
    """Share of a copy's bandwidth by rows, a line for each context and cache."""
    records = _records(sets, "attention")
    if not records:
        return None
    with figure(height=3.8) as (drawing, axis):
        lines: dict[tuple, list] = {}
        for record in records:
            key = (record["model"], record["kv_bits"], record["context"])
            lines.setdefault(key, []).append((record["batch"], 100 * record["of_copy"]))
        for number, ((model, bits, context), points) in enumerate(lines.items()):
            style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
            label = f"{model}, {bits}-bit cache, {context:,} tokens"
            axis.plot(*zip(*sorted(points), strict=True), linestyle="-" if bits == 8 else "--", label=label, **style)
        axis.set(ylim=(0, 105), title="Decode attention of one layer", ylabel="% of a copy's GB/s")
        counts(axis, [record["batch"] for record in records], "rows of the batch")
        axis.legend(fontsize=8)
        note(drawing, _source(sets, "attention"))
    return drawing


def decode(sets) -> Figure | None:
    """Tokens a second of all rows, against batch and against context."""
    records = [r for r in _records(sets, "decode") if "peer" not in r]
    others = [r for r in _records(sets, "decode") if "peer" in r]
    if not records:
        return None
    contexts = [record["context"] for record in records]
    context, batch = max(contexts, key=contexts.count), min(record["batch"] for record in records)
    panels = [("batch", "context", context, "rows of the batch")]
    if len({r["context"] for r in records if r["batch"] == batch}) > 1:
        panels.append(("context", "batch", batch, "tokens in the cache"))
    with figure(len(panels), width=9.0, height=4.2) as (drawing, axes):
        for axis, (x, fixed, value, label) in zip(np.atleast_1d(axes), panels, strict=True):
            lines: dict[str, list] = {}
            for record in [*records, *others]:
                if record[fixed] == value:
                    kind = f"{record['peer']}, {record.get('mode')}" if "peer" in record else record.get("form", "")
                    name = f"{record['model']}, Int{record['bits']}, {record['kv_bits']}-bit cache, {kind}"
                    name += ", int8 head" if record.get("lm_head") == "int8" else ""
                    lines.setdefault(name.replace("Int16", "16-bit"), []).append(
                        (record[x], record["tokens_per_second"])
                    )
            models = list(dict.fromkeys(name.split(",")[0] for name in lines))
            forms = list(dict.fromkeys(name.split(",", 1)[1] for name in lines))
            for name, points in lines.items():  # a color a model, a marker a form
                model, form = name.split(",", 1)
                style = {"color": COLORS[models.index(model) % len(COLORS)]}
                style["marker"] = MARKERS[forms.index(form) % len(MARKERS)]
                axis.plot(*zip(*sorted(points), strict=True), label=name, **style)
            axis.set(yscale="log", title=f"Decode, {fixed} {value:,}", ylabel="tokens/s of all rows")
            counts(axis, [r[x] for r in [*records, *others] if r[fixed] == value], label)
        np.atleast_1d(axes)[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        note(drawing, _source(sets, "decode"))
    return drawing

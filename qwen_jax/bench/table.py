"""Measurements as a table for the terminal and for Markdown, from the records that the JSON files hold."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

type Record = Mapping[str, Any]


class Column(NamedTuple):
    """A heading and what a record shows under it; None where it has nothing to show."""

    heading: str
    value: Callable[[Record], str | None]


def number(key: str, form: str = ".1f", scale: float = 1.0) -> Callable[[Record], str | None]:
    """Shows a number of the record, if it has one, times `scale`."""
    return lambda record: None if record.get(key) is None else format(record[key] * scale, form)


def text(key: str) -> Callable[[Record], str | None]:
    """Shows an entry as it is."""
    return lambda record: None if record.get(key) is None else str(record[key])


def _bits(key: str) -> Callable[[Record], str | None]:
    return lambda record: None if record.get(key) is None else {16: "16-bit"}.get(record[key], f"int{record[key]}")


def yes_no(key: str) -> Callable[[Record], str | None]:
    """Shows a truth as yes or **no**: a miss is to be seen."""
    return lambda record: None if record.get(key) is None else "yes" if record[key] else "**no**"


def _mesh(record: Record) -> str | None:
    return None if record.get("mesh") in (None, "1x1") else record["mesh"]


_MODEL = [
    Column("model", text("model")),
    Column("weights", _bits("bits")),
    Column("head", text("lm_head")),
    Column("KV", _bits("kv_bits")),
    Column("batch", text("batch")),
    Column("context", text("context")),
    Column("mesh", _mesh),
]
_RATE = [
    Column("GB/s", number("gigabytes_per_second", ".0f")),
    Column("of copy", number("of_copy", ".0%")),
]
_ONE_DEVICE = [
    Column("one device, ms", number("one_device_ms", ".3f")),
    Column("times", number("times", ".2f")),
    Column("efficiency", number("efficiency", ".0%")),
    Column("tokens", text("same_tokens")),
    Column("one device failed", text("one_device_failed")),
]
_TARGETS = [
    Column("target", text("target")),
    Column("met", yes_no("met")),
    Column("aim", text("aim")),
    Column("reached", yes_no("aim_met")),
    Column("failed", text("failed")),
]

COLUMNS: dict[str, list[Column]] = {
    "decode": [
        *_MODEL,
        Column("form", text("form")),
        Column("tokens/s", number("tokens_per_second")),
        Column("ms/step", number("step_ms", ".3f")),
        Column("floor ms", number("floor_ms", ".3f")),
        *_RATE,
        Column("× peer", number("times_peer", ".2f")),
        Column("busy ms", number("busy_ms", ".3f")),
        Column("reductions ms", number("reductions_ms", ".3f")),
        Column("peak GB", number("peak_bytes", ".2f", 1e-9)),
        *_ONE_DEVICE,
        *_TARGETS,
    ],
    "prefill": [
        *_MODEL,
        Column("ms", number("milliseconds")),
        Column("floor ms", number("floor_ms")),
        Column("of floor", number("of_floor", ".0%")),
        Column("tokens/s", number("tokens_per_second", ".0f")),
        Column("TFLOP/s", number("teraflops", ".1f")),
        Column("peak GB", number("peak_bytes", ".2f", 1e-9)),
        *_ONE_DEVICE,
        *_TARGETS,
    ],
    "matmul": [
        Column("in × out", lambda record: f"{record['in']} × {record['out']}"),
        Column("rows", text("rows")),
        Column("weights", _bits("bits")),
        Column("group", text("group_size")),
        Column("µs", number("us", ".2f")),
        Column("floor µs", number("floor_us", ".2f")),
        Column("of floor", number("of_floor", ".0%")),
        *_RATE,
        Column("error", number("error", ".1e")),
        Column("kernel", text("kernel")),
        Column("fastest peer", text("fastest_peer")),
        Column("its µs", number("peer_us")),
        Column("× it", number("of_peer", ".2f")),
        *_TARGETS,
    ],
    "attention": [
        Column("model", text("model")),
        Column("KV", _bits("kv_bits")),
        Column("batch", text("batch")),
        Column("context", text("context")),
        Column("kernel", text("kernel")),
        Column("µs", number("us", ".1f")),
        Column("floor µs", number("floor_us", ".1f")),
        Column("of floor", number("of_floor", ".0%")),
        *_RATE,
        Column("× 16-bit", number("times_16_bit", ".2f")),
        Column("error", number("error", ".1e")),
        *_TARGETS,
    ],
    "memory": [
        *_MODEL[:6],
        Column("peak GB", number("peak_bytes", ".2f", 1e-9)),
        Column("as compiled GB", number("compiled_bytes", ".2f", 1e-9)),
        Column("how", text("how")),
        Column("making weights GB", number("peak_bytes_of_making", ".2f", 1e-9)),
        Column("weights GB", number("weight_bytes", ".2f", 1e-9)),
        Column("cache GB", number("cache_bytes", ".2f", 1e-9)),
        Column("rest GB", number("rest_bytes", ".2f", 1e-9)),
        *_TARGETS,
    ],
}


def cells(kind: str, records: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; a column that no record fills is left out."""
    records = list(records)
    columns = [(column.heading, [column.value(record) for record in records]) for column in COLUMNS[kind]]
    columns = [column for column in columns if any(value is not None for value in column[1])]
    headings = [heading for heading, _ in columns]
    rows = [[values[row] or "" for _, values in columns] for row in range(len(records))]
    return headings, rows


def terminal(kind: str, records: Iterable[Record]) -> Table:
    """For a rich console."""
    headings, rows = cells(kind, records)
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        left = heading in ("model", "in × out", "kernel", "how", "form", "failed")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "failed", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, ending in a newline."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

"""The table of measured tilings of `mosaic_gpu`: a JSON file for each chip, which `qwen-jax bench tune` writes.

    {"jax": ..., "date": ..., "entries": {"4 bits, 4096 x 11008": {"16": {"tiling": [6, 2, 2], "us": 13.1}}}}

An entry holds for its number of rows of x and down to half as many. A damaged table is an error, never ignored: a model
would silently be slower.
"""

import json
import pathlib
import re
from typing import Any

KEY = re.compile(r"([48]) bits, (\d+) x (\d+)")
# Fields of the tilings of `mosaic_gpu_small` and `mosaic_gpu_large`.
SMALL, LARGE = (int, int, int), (int, int, int, int, bool)


def key(bits: int, in_features: int, out_features: int) -> str:
    """Of a matrix in `entries`."""
    return f"{bits} bits, {in_features} x {out_features}"


def sizes(name: str) -> tuple[int, int, int]:
    """(bits, in, out) of a key."""
    found = KEY.fullmatch(name)
    assert found  # `read` has looked at it
    return int(found[1]), int(found[2]), int(found[3])


def read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The entries.

    Raises:
        ValueError: for anything that `write` would not have written; says where.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _damaged(path, f"no JSON ({error})") from error
    entries = table.get("entries") if isinstance(table, dict) else None
    if not isinstance(entries, dict):
        raise _damaged(path, 'no object "entries"')
    for name, rows in entries.items():
        if not KEY.fullmatch(name) or not isinstance(rows, dict):
            raise _damaged(path, f"the entry {name!r}, expected a name like '4 bits, 4096 x 11008' with an object")
        for count, entry in rows.items():
            values = entry.get("tiling") if isinstance(entry, dict) else None
            if not count.isdigit() or not int(count) or not _tiling(values):
                raise _damaged(
                    path,
                    f"{name}, {count!r} rows: {entry!r}, expected a tiling of {len(SMALL)} numbers for few rows or "
                    f"{len(LARGE)} for many",
                )
    return entries


def write(path: pathlib.Path, entries: dict[str, dict[str, Any]], jax: str, date: str) -> None:
    """A table, sorted, a tiling a line."""
    blocks = []
    for name in sorted(entries, key=lambda name: sizes(name)):
        rows = [f'   "{rows}": {json.dumps(entries[name][rows])}' for rows in sorted(entries[name], key=int)]
        blocks.append(f'  "{name}": {{\n' + ",\n".join(rows) + "\n  }")
    head = f'{{\n "jax": {json.dumps(jax)},\n "date": {json.dumps(date)},\n "entries": {{\n'
    path.write_text(head + ",\n".join(blocks) + "\n }\n}\n", encoding="utf-8")


def _tiling(values) -> bool:
    if not isinstance(values, list):
        return False
    kinds = SMALL if len(values) == len(SMALL) else LARGE
    right = len(values) == len(kinds)
    right = right and all(type(v) is kind and v >= (kind is int) for v, kind in zip(values, kinds, strict=True))
    return right and (kinds is SMALL or (values[1] % 8 == 0 and values[1] <= 256))


def _damaged(path: pathlib.Path, found: str) -> ValueError:
    return ValueError(f"{path}: found {found}. Make the table again with qwen-jax bench tune, or delete it.")

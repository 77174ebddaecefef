"""What `qwen-jax bench --output` and `benchmarks/hopper.py` wrote, as Markdown with figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.bench import table

type Results = Mapping[str, Any]  # {"kind", "environment", "copy_gigabytes_per_second", "results"}

TITLES = {
    "matmul": "Matmul",
    "attention": "Attention over the cache, one layer of a decode step",
    "decode": "Decode",
    "prefill": "Prefill",
    "memory": "Device memory at its peak",
}


def read(paths: Sequence[Path]) -> tuple[list[Results], dict[str, Any]]:
    """All results, and the parts (of `hopper.py`) that did not end well, by name.

    Raises:
        ValueError: a file is no JSON, or holds something else.
    """
    found: list[Results] = []
    failed: dict[str, Any] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: no JSON ({error}). Give what qwen-jax bench --output wrote.") from error
        sets = content.get("sets", [content]) if isinstance(content, dict) else content
        for one in sets if isinstance(sets, list) else [sets]:
            if not isinstance(one, dict) or one.get("kind") not in TITLES or not isinstance(one.get("results"), list):
                kind = one.get("kind") if isinstance(one, dict) else type(one).__name__
                raise ValueError(
                    f"{path}: kind: found {kind}, expected one of {', '.join(TITLES)} with a list of results. "
                    "Give what qwen-jax bench --output or benchmarks/hopper.py wrote."
                )
            found.append(one)
        if isinstance(content, dict):
            failed |= {name: part for name, part in content.get("parts", {}).items() if part["state"] != "done"}
    return found, failed


def markdown(sets: Sequence[Results], failed: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        sets: of `read`.
        failed: of `read`.
        figures: file name of a figure by its title.
    """
    first = sets[0]["environment"]
    lines = [f"# Benchmarks on {first.get('device', 'an unnamed device')}, {first.get('date', 'undated')}", ""]
    lines += [*_missed(sets), *(f"![{title}]({name})\n" for title, name in figures.items())]
    for kind, title in TITLES.items():
        same = [one for one in sets if one["kind"] == kind]
        ours = [one for one in same if not all("peer" in record for record in one["results"])]
        peers = [record for one in same for record in one["results"] if "peer" in record]
        if same:
            lines.append(f"## {title}\n")
        for one in ours:
            lines += [_source(one), "", table.markdown(*table.cells(kind, one["results"]))]
        if peers:
            lines += ["Peers in the same call:\n", _peers(kind, peers)]
    if failed:
        lines.append("## Parts that did not end well\n")
        lines += [f"- {name}: {part['state']} (after {part.get('seconds', '?')} s)" for name, part in failed.items()]
        lines.append("")
    return "\n".join(lines)


def _missed(sets: Sequence[Results]) -> list[str]:
    """How many targets were met, and each that was not."""
    judged = [(one["kind"], record) for one in sets for record in one["results"] if "met" in record]
    failed = [(one["kind"], record) for one in sets for record in one["results"] if "failed" in record]
    if not judged and not failed:
        return []
    met = sum(record["met"] for _, record in judged)
    aims = [record["aim_met"] for _, record in judged if "aim_met" in record]
    lines = [f"Targets: {met} of {len(judged)} met; further aims: {sum(aims)} of {len(aims)} reached.\n"]
    lines += [
        f"- missed: {_named(kind, r)}: {_value(kind, r)}, target {r['target']}" for kind, r in judged if not r["met"]
    ]
    lines += [f"- failed: {_named(kind, r)}: {r['failed']}" for kind, r in failed]
    return [*lines, ""]


def _named(kind: str, record: Mapping[str, Any]) -> str:
    if kind == "matmul":
        return f"{record['in']} × {record['out']}, {record.get('bits', '')} bits, {record['rows']} rows"
    keys = ("peer", "model", "kv_bits", "batch", "context", "form")
    names = {"kv_bits": "-bit cache", "batch": " rows", "context": " tokens"}
    return f"{kind} " + ", ".join(f"{record[key]}{names.get(key, '')}" for key in keys if key in record)


def _value(kind: str, record: Mapping[str, Any]) -> str:
    if kind in ("matmul", "attention"):
        share = f", {record['of_copy']:.0%} of copy" if "of_copy" in record else ""
        times = f", {record['times_16_bit']:.2f} × 16-bit" if "times_16_bit" in record else ""
        return f"{record['us']:.1f} µs{share}{times}"
    if kind == "decode":
        times = f", {record['times_peer']:.2f} × the peer" if "times_peer" in record else ""
        return f"{record['tokens_per_second']:.1f} tokens/s{times}"
    return f"{record['milliseconds']:.1f} ms" if kind == "prefill" else f"{record['peak_bytes'] / 1e9:.2f} GB"


def _source(one: Results) -> str:
    facts, copy = one["environment"], one.get("copy_gigabytes_per_second")
    parts = [facts.get("device"), facts.get("driver") and f"driver {facts['driver']}"]
    parts += [facts.get("jax") and f"JAX {facts['jax']}", facts.get("date")]
    parts += [copy and f"a copy moves {copy:.0f} GB/s", facts.get("command") and f"`{facts['command']}`"]
    return ", ".join(part for part in parts if part)


def _peers(kind: str, peers: Sequence[Mapping[str, Any]]) -> str:
    """µs of each by shape and rows, or a line each for whole models."""
    if kind != "matmul":
        records = [{**peer, "form": f"{peer['peer']}, {peer.get('mode', '')}"} for peer in peers]
        return table.markdown(*table.cells(kind, records))
    names = list(dict.fromkeys(peer["peer"] for peer in peers))
    cases: dict[tuple[int, int, int], dict[str, str]] = {}
    for peer in peers:
        cell = "failed" if "failed" in peer else f"{peer['us']:.2f}"
        cases.setdefault((peer["in"], peer["out"], peer["rows"]), {})[peer["peer"]] = cell
    rows = [
        [f"{inputs} × {outputs}", str(count), *(found.get(name, "") for name in names)]
        for (inputs, outputs, count), found in cases.items()
    ]
    return table.markdown(["in × out", "rows", *(f"{name}, µs" for name in names)], rows)

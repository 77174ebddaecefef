"""What the kernels and models are to reach on one H100 80GB, and what was reached: marks added to results.

A record gets `target` (text), `met`, and where there is a further aim `aim` and `aim_met`. Peers are those measured in
the same call: a ratio between two calls means little.
"""

from collections.abc import Iterable, Mapping
from typing import Any

DECODE = {  # (model, batch) → tokens/s: at least, aim
    ("qwen-1.8b", 1): (1100, 1600),
    ("qwen-7b", 1): (390, 454),
    ("qwen-14b", 1): (225, 261),
    ("qwen-72b", 1): (50, 57),
    ("qwen-7b", 32): (2600, 3400),
    ("qwen-14b", 32): (1400, 1900),
}
TIMES_TORCH = 1.35  # qwen-7b at batch 1 against the compiled torch step
PREFILL_MS = {"qwen-7b": (75, 50)}
MEMORY_GB = {"qwen-1.8b": 2.0, "qwen-7b": 6.2, "qwen-14b": 10.5, "qwen-72b": 45.0}
LAUNCH_US = 3.0  # a launch and the first byte's latency


def mark(sets: Iterable[Mapping[str, Any]]) -> None:
    """Adds marks to the records of all sets in place; the sets are one call's."""
    sets = list(sets)
    peers = [r for s in sets for r in s["results"] if "peer" in r and "failed" not in r]
    for one in sets:
        for record in one["results"]:
            if "peer" in record or "failed" in record:
                continue
            judge = {"matmul": _matmul, "attention": _attention, "decode": _decode}.get(one["kind"])
            if judge is not None:
                judge(record, peers, one["results"])
            elif one["kind"] == "prefill" and record["context"] == 2048 and record["model"] in PREFILL_MS:
                least, aim = PREFILL_MS[record["model"]]
                _set(record, f"≤ {least} ms", record["milliseconds"] <= least)
                _aim(record, f"≤ {aim} ms", record["milliseconds"] <= aim)
            elif one["kind"] == "memory" and _standard(record) and record["batch"] == 1:
                most = MEMORY_GB.get(record["model"])
                if most is not None:
                    _set(record, f"≤ {most} GB", record["peak_bytes"] <= most * 1e9)


def _set(record, text: str, met: bool) -> None:
    record |= {"target": text, "met": met}


def _aim(record, text: str, met: bool) -> None:
    record |= {"aim": text, "aim_met": met}


def _standard(record) -> bool:
    return (record["bits"], record["kv_bits"], record["context"], record.get("lm_head")) == (4, 8, 2048, None)


def _matmul(record, peers, _) -> None:
    rows = record["rows"]
    if record["kernel"].startswith("xla"):  # measured beside, for chips without a kernel of ours
        return
    if record["bits"] == 8 and rows <= 64:
        _set(record, "≥ 75 % of copy", record["of_copy"] >= 0.75)
        _aim(record, "≥ 85 %", record["of_copy"] >= 0.85)
    if record["bits"] != 4:
        return
    same = [p for p in peers if p["kind"] == "matmul" and all(p[k] == record[k] for k in ("in", "out", "rows"))]
    if same:
        fastest = min(same, key=lambda peer: peer["us"])
        record |= {"fastest_peer": fastest["peer"], "peer_us": fastest["us"], "of_peer": record["us"] / fastest["us"]}
        factor = 1.0 if rows <= 64 else 1.05
        text = f"{'<' if rows <= 64 else '≤ 1.05 ×'} {fastest['us']:.1f} µs"
        _set(record, text, record["of_peer"] < factor if rows <= 64 else record["of_peer"] <= factor)
        if rows > 64:
            _aim(record, "≤ 0.95 ×", record["of_peer"] <= 0.95)
    if rows <= 16:
        _aim(record, f"≤ {record['floor_us'] + LAUNCH_US:.1f} µs", record["us"] <= record["floor_us"] + LAUNCH_US)
    elif rows == 64:
        bytes_us = record["us"] * record["of_copy"]  # of the bytes alone
        _aim(record, f"≤ {1.8 * bytes_us:.1f} µs", record["us"] <= 1.8 * bytes_us)


def _attention(record, _, others) -> None:
    if record["kv_bits"] != 8 or record["batch"] < 8 or record["context"] < 2048:
        return
    keys = ("model", "batch", "context")
    wide = [r for r in others if "us" in r and r["kv_bits"] == 16 and all(r[k] == record[k] for k in keys)]
    met, text = record["of_copy"] >= 0.7, "≥ 70 % of copy"
    if wide:
        record["times_16_bit"] = wide[0]["us"] / record["us"]
        met, text = met and record["times_16_bit"] >= 1.6, f"{text}, ≥ 1.6 × 16-bit"
    _set(record, text, met)
    _aim(record, "≥ 85 %", record["of_copy"] >= 0.85)


def _decode(record, peers, _) -> None:
    least, aim = DECODE.get((record["model"], record["batch"]), (None, None))
    if least is None or aim is None or not _standard(record):
        return
    speed = record["tokens_per_second"]
    met, text = speed >= least, f"≥ {least} tokens/s"
    keys = ("model", "batch", "context")
    torch = [p for p in peers if p["kind"] == "decode" and all(p[k] == record[k] for k in keys)]
    if torch:
        record["times_peer"] = speed / max(p["tokens_per_second"] for p in torch)
        if (record["model"], record["batch"]) == ("qwen-7b", 1):
            met, text = met and record["times_peer"] >= TIMES_TORCH, f"{text}, ≥ {TIMES_TORCH} × torch"
    _set(record, text, met)
    _aim(record, f"≥ {aim}", speed >= aim)

"""The table of searched tiles and rings of `mosaic_gpu_decode`, JSON that `qwen-jax bench tune` adds to.

    {"about": ..., "plans": [{"when": {"quantized": true, "share": [2, 8]}, "blocks": 1, "stages": 4, ...}, ...]}

The first plan whose conditions hold is used, so the last has none. A damaged table is an error, never ignored.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

PATH = pathlib.Path(__file__).parent / "tuned" / "mosaic_gpu.json"
NUMBERS = ("blocks", "stages", "blocks_a_multiprocessor")
CONDITIONS = {"share": int, "head_dim": int, "quantized": bool, "biased": bool}
NOTES = ("us", "jax", "date", "model")  # of a search, read by nobody


def matches(when: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether each condition holds: a value, or [least, most]."""
    return all(
        rule[0] <= facts[name] <= rule[1] if isinstance(rule, list) else facts[name] == rule
        for name, rule in when.items()
    )


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The plans.

    Raises:
        ValueError: for a table that cannot be used for every shape; says where.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _damaged(path, f"no JSON ({error})") from error
    plans = table.get("plans") if isinstance(table, dict) else None
    if not isinstance(plans, list) or not plans:
        raise _damaged(path, 'no list "plans"')
    for number, plan in enumerate(plans):
        if not isinstance(plan, dict) or not _right(plan):
            raise _damaged(
                path,
                f'plan {number}: {plan!r}, expected the conditions "when" ({", ".join(CONDITIONS)}) and positive '
                f"numbers {', '.join(NUMBERS)}",
            )
    if plans[-1]["when"]:
        raise _damaged(path, "conditions in the last plan, expected none: a shape could be without a plan")
    return plans


def write(path: pathlib.Path, plans: list[dict[str, Any]]) -> None:
    """A table, a plan a line."""
    about = "Decode attention on Hopper: the first row whose conditions hold (a value, or [least, most]) is used."
    lines = ",\n".join(f"    {json.dumps(plan)}" for plan in plans)
    path.write_text(f'{{\n  "about": {json.dumps(about)},\n  "plans": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def _right(plan: Mapping[str, Any]) -> bool:
    when = plan.get("when")
    return (
        isinstance(when, dict)
        and set(plan) <= {"when", *NUMBERS, *NOTES}
        and all(type(plan.get(name)) is int and plan[name] > 0 for name in NUMBERS)
        and all(name in CONDITIONS and _rule(CONDITIONS[name], rule) for name, rule in when.items())
    )


def _rule(kind: type, rule) -> bool:
    if kind is int and isinstance(rule, list):
        return len(rule) == 2 and all(type(bound) is int for bound in rule)
    return type(rule) is kind


def _damaged(path: pathlib.Path, found: str) -> ValueError:
    return ValueError(f"{path}: found {found}. Mend it, or install the package again.")

"""Searching tilings of the Hopper kernels: every candidate is timed and compared with the reference, the fastest kept.

Candidates are those that fit a block's shared memory; of the many for large products, those that the model of cycles in
`mosaic_gpu` puts first. Shapes that were never searched keep the tiling computed from their sizes.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.chip import HOPPER, is_hopper
from pallas_kernels.kv_attention import mosaic_gpu_tuned as attention_table
from pallas_kernels.kv_attention import shapes
from pallas_kernels.quantized_matmul import layout_mosaic_gpu as layout
from pallas_kernels.quantized_matmul import mosaic_gpu, mosaic_gpu_tuned
from qwen_jax.bench import attention, matmul
from qwen_jax.bench.environment import environment

LARGEST_ERROR = 4e-3  # ‖e‖ / ‖reference‖ in bfloat16; a tiling beyond it is wrong, however fast
MOST_CANDIDATES = 10
PATIENCE = 300  # seconds for compiling all candidates
GAIN = 0.98  # of the time of what is used now: less is noise, and the table stays as it is


def matmul_candidates(bits: int, in_features: int, out_features: int, rows: int, group_size: int = 128) -> list[list]:
    """Tilings worth timing, as the table holds them."""
    shape = (rows, in_features, out_features, bits, group_size)
    strips = -(-out_features // layout.PADDING) * (layout.PADDING // layout.STRIP)
    found = []
    if rows <= mosaic_gpu.SMALL_ROWS:
        computed = mosaic_gpu.computed_tiling(*shape)
        counts = sorted({1, 2, 3, 4, 6, computed.strips})
        for count, warpgroups in itertools.product(counts, (1, 2, 4)):
            ring = [slots for slots in (4, 3, 2, 1) if _fits([count, warpgroups, slots], shape)]
            found += [(rank, [count, warpgroups, slots]) for rank, slots in enumerate(ring[:2])]
        # The deepest rings first: shallow ones wait for memory. Then those nearest to one wave of blocks.
        found.sort(key=lambda one: (one[0], abs(math.log(one[1][0] * mosaic_gpu.MULTIPROCESSORS / strips))))
        return [values for _, values in found[:MOST_CANDIDATES]]
    for candidate in mosaic_gpu.large_candidates(rows, in_features, out_features):
        for scale_sums in {candidate[1] <= 64, False}:
            tiling = mosaic_gpu.deepest(*candidate, scale_sums, shape)
            found += [] if tiling is None else [list(dataclasses.astuple(tiling))]
    return found[:MOST_CANDIDATES]


def _fits(values: Sequence, shape: tuple[int, ...]) -> bool:
    return mosaic_gpu.fits(mosaic_gpu.tiling_of(values), *shape)


def tune_matmul(
    cases: Iterable[tuple[int, int]], *, rows: Sequence[int], bits: Sequence[int], output: Path | None = None
) -> tuple[Path, float, list[dict[str, Any]]]:
    """Searches, and writes the table that the kernels load; (its path, a copy's GB/s, every record).

    Args:
        cases: (in, out).
        rows: of the activations.
        bits: 4 or 8.
        output: another file, which gets the shipped entries as well; None for the table of this installation.

    Raises:
        ValueError: no Hopper GPU is here.
    """
    chip = _chip("matmul")
    cases = list(cases)
    tilings = {
        (width, inputs, outputs, count): matmul_candidates(width, inputs, outputs, count)
        for width in bits
        for inputs, outputs in cases
        for count in rows
    }
    copy, records = matmul.measure(cases, rows=rows, bits=bits, tilings=tilings, patience=PATIENCE)
    # A copy of each level: what is cached stays as it was read.
    entries = {name: dict(found) for name, found in mosaic_gpu.tuned(chip).items()}
    for (width, inputs, outputs, count), _ in tilings.items():
        named = {"bits": width, "in": inputs, "out": outputs, "rows": count}
        same = [r for r in records if named.items() <= r.items()]
        best = fastest(same, used=lambda record: record["origin"] != "tried")
        if best is not None:
            found = entries.setdefault(mosaic_gpu_tuned.key(width, inputs, outputs), {})
            found[str(count)] = {"tiling": best["tiling"], "us": round(best["us"], 2)}
    path = mosaic_gpu.tuned_path(chip) if output is None else output
    facts = environment()
    mosaic_gpu_tuned.write(path, entries, facts["jax"], facts["date"][:10])
    mosaic_gpu.tuned.cache_clear()
    return path, copy, records


def fastest(records: Sequence[Mapping[str, Any]], used) -> Mapping[str, Any] | None:
    """The fastest right record; the one in use (`used(record)`) unless another is faster by more than noise."""
    right = [r for r in records if "us" in r and r["error"] <= LARGEST_ERROR]
    if not right:
        return None
    best = min(right, key=lambda record: record["us"])
    now = next((record for record in right if used(record)), None)
    return now if now is not None and best["us"] > GAIN * now["us"] else best


def tune_attention(
    models: Sequence[tuple[str, shapes.AttentionDims]],
    *,
    kv_bits: Sequence[int],
    batch: Sequence[int],
    context: Sequence[int],
    output: Path | None = None,
) -> tuple[Path, float, list[dict[str, Any]]]:
    """As `tune_matmul`, one plan for each kind of cache and heads: the least product of its times over all cases.

    Args:
        models: (name, dimensions).
        kv_bits: 8 or 16.
        batch: rows.
        context: tokens in the cache of each row.
        output: another file than this installation's table.
    """
    _chip("attention")
    plans: list[dict[str, int]] = [
        dict(zip(attention_table.NUMBERS, values, strict=True))
        for values in itertools.product((1, 2), (2, 3, 4, 6), (1, 2))
    ]
    copy, records = attention.measure(models, batch=batch, context=context, kv_bits=kv_bits, plans=plans)
    table, facts = attention_table.read(attention_table.PATH), environment()
    for name, dims in models:
        for bits in kv_bits:
            same = [r for r in records if (r["model"], r["kv_bits"]) == (name, bits)]
            best = best_plan(same, len(batch) * len(context))
            if best is None:
                continue
            when = {"quantized": bits == 8, "share": dims.heads // dims.kv_heads, "head_dim": dims.head_dim}
            when |= {"biased": bits == 8 and dims.key_bias}
            row = {"when": when, **best, "model": name, "jax": facts["jax"], "date": facts["date"][:10]}
            table = [row, *(plan for plan in table if plan["when"] != when)]
    path = attention_table.PATH if output is None else output
    attention_table.write(path, table)
    return path, copy, records


def best_plan(records: Sequence[Mapping[str, Any]], cases: int) -> dict[str, int] | None:
    """The plan tried that is fastest over all of so many cases; None where what is used now is as fast."""

    def score(plan) -> float:
        found = [r for r in records if r.get("plan") == plan and "us" in r and r["error"] <= LARGEST_ERROR]
        return math.inf if len(found) < cases else sum(math.log(record["us"]) for record in found)

    tried = [dict(values) for values in {tuple(r["plan"].items()) for r in records if "plan" in r}]
    best = min(tried, key=score, default=None)
    if best is None or score(best) == math.inf or score(best) > score(None) + cases * math.log(GAIN):
        return None
    return best


def _chip(what: str) -> str:
    chip = jax.devices()[0].device_kind
    if not is_hopper(chip):
        raise ValueError(
            f"bench tune {what}: found the device {chip}, expected one of {', '.join(HOPPER)}: no other has tables."
        )
    return chip

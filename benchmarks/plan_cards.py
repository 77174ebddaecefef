"""What `qwen-jax plan` predicts for four and eight H100s of one host, where none are at hand to measure.

    python benchmarks/plan_cards.py        writes benchmarks/results/plan_h100.md

Ceilings by arithmetic: a step's bytes at the memory's bandwidth, its products at the arithmetic's peak, and its
reductions, of which each costs its latency and its bytes. Latencies are those measured on two cards
(benchmarks/results/two_cards.md, two_h200.md): 15 µs a reduction of XLA's, 6 a sum in a launch of each card's own (to
64 rows), 1 inside the one launch that decodes up to 8 rows of Int4.
"""

import dataclasses
import pathlib
import textwrap

import jax

jax.config.update("jax_platforms", "cpu")

from qwen_jax.bench.models import MODELS  # noqa: E402
from qwen_jax.plan import chips, plan  # noqa: E402
from qwen_jax.plan.abstract import Storage  # noqa: E402
from qwen_jax.plan.plan import Plan  # noqa: E402

RESULT = pathlib.Path(__file__).parent / "results" / "plan_h100.md"
NAMES, BITS, BATCHES, CONTEXTS = ("qwen-14b", "qwen-72b", "qwen2.5-72b"), (4, 16), (1, 8, 32, 128), (2048, 16384)
MESHES = ((1, 2), (1, 4), (2, 2), (1, 8), (2, 4))
ONE = {"batch": 1, "context": 2048, "kv_bits": 8}
MEASURE = """## To measure

One call on a host with four cards (eight: `1x8`, `--pieces 8`); rows are model, bits, what, batch, mesh, form:

    printf 'qwen-72b 4 decode 1 1x4 one\\nqwen-72b 4 decode 1 1x1 one\\n' > rows.txt
    python benchmarks/two_cards.py --rows rows.txt --pieces 4 --output four_cards.json
    qwen-jax bench decode --model qwen-14b --bits 16 --mesh 2x2 --batch 8 --batch 32 --check

The first makes Int4 weights on the cards; the second takes any model, bits and mesh, and makes them on the host."""
LATENCY = {"XLA's": 15e-6, "a launch each": 6.3e-6, "one launch": 1e-6}


def predicted(name: str, bits: int, data: int, model: int, batch: int, context: int) -> Plan:
    """The plan of a mesh, its reductions as fast as those of the form that decodes so many rows."""
    form = "XLA's" if batch > 64 * data else "a launch each"
    form = "one launch" if bits == 4 and batch <= 8 and data * model > 1 else form
    sizes = dict(batch=batch, context=context, kv_bits=8)
    return plan.estimate(MODELS[name], Storage(bits=bits), _cards(data * model, form), data, model, **sizes)


def _cards(count: int, form: str) -> chips.Topology:
    topology = chips.parse(f"h100:{count}")
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, hop=LATENCY[form]))


def cell(found: Plan, alone: Plan) -> str:
    """Tokens/s at best, and how many times those of one card where it holds the model."""
    if not found.fits:
        return "–"
    times = f" ({found.tokens_per_second / alone.tokens_per_second:.1f} ×)" if alone.fits else ""
    return f"{found.tokens_per_second:.0f}{times}"


def main() -> None:
    """Writes the table."""
    heads = ["model", "bits", "context", "batch", "one card", *(f"{data}x{model}" for data, model in MESHES)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in NAMES:
        for bits in BITS:
            for context in CONTEXTS:
                for batch in BATCHES:
                    what = (batch, context)
                    alone = predicted(name, bits, 1, 1, *what)
                    cells = [name, str(bits), str(context), str(batch), cell(alone, alone).partition(" (")[0]]
                    cells += [
                        cell(predicted(name, bits, *mesh, *what), alone) if mesh[0] <= batch else "" for mesh in MESHES
                    ]
                    lines.append(f"| {' | '.join(cells)} |")
    slow = plan.estimate(MODELS["qwen-72b"], Storage(), _cards(4, "a launch each"), 1, 4, **ONE)
    alone, four = (predicted("qwen-72b", 4, 1, model, 1, 2048).tokens_per_second for model in (1, 4))
    floats = [predicted("qwen-72b", 16, 1, model, 1, 2048) for model in (4, 8)]
    bound = 1 / floats[0].read_seconds
    rates = [found.tokens_per_second for found in floats]
    notes = (
        "Tokens/s of all rows at best, by `python benchmarks/plan_cards.py`; in brackets times one card's prediction; "
        "– does not fit. 8-bit cache, 16-bit head; up to 8 rows of Int4 in one launch. No program reaches these: one "
        "card has 68–85 % of them for 7B to 72B at batch 1 ([measured](h100_decode.md)), two cards 79 % for 72B "
        "([measured](two_cards.md)).",
        f"- 72B Int4, batch 1, four cards: {four / alone:.1f} × one card in one launch, "
        f"{slow.tokens_per_second / alone:.1f} × with a kernel at a time (aim: 2.6).",
        f"- 72B bf16, batch 1: four cards {rates[0]:.0f} tokens/s, {rates[0] / 17.6:.1f} × the published 17.6 of two "
        f"A100s, eight {rates[1]:.0f} ({rates[1] / 17.6:.1f} ×). The aim, 8 × 17.6 = 141, is beyond four cards at "
        f"batch 1: they read their weights {bound:.0f} times a second at 3.35 TB/s.",
    )
    filled = [textwrap.fill(note, 120, subsequent_indent="  " if note.startswith("-") else "") for note in notes]
    title = "# Four and eight H100s: predicted, not measured"
    RESULT.write_text("\n\n".join([title, filled[0], "\n".join(filled[1:]), "\n".join(lines), MEASURE]) + "\n")


if __name__ == "__main__":
    main()

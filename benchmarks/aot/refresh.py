"""Compiles every TPU kernel at true shapes and whole programs, without a TPU, and writes the table of what they take.

    python benchmarks/aot/refresh.py            all of it, about 40 minutes on two cores
    python benchmarks/aot/refresh.py --missing  only lines that the table has not, of the versions that it names
    python benchmarks/aot/refresh.py --quick    7B and 72B alone

Needs libtpu (the extra "aot"). Results: benchmarks/results/aot.json and aot.md.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib

import jax

jax.config.update("jax_platforms", "cpu")

from qwen_jax.bench.models import MODELS  # noqa: E402
from qwen_jax.plan import aot, chips, kernels, plan  # noqa: E402
from qwen_jax.plan.abstract import Storage  # noqa: E402

RESULTS = pathlib.Path(__file__).parents[1] / "results"
NAMES = ("qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b", "qwen2.5-7b", "qwen3-8b")
TOPOLOGIES = {"v5e": ("v5e:1x1", "v5e:2x4"), "v5p": ("v5p:1x1x1", "v5p:2x2x1"), "v6e": ("v6e:1x1", "v6e:2x2")}
PREFILLED = ("qwen-7b", "qwen-72b", "qwen2.5-7b")  # whose prefill is compiled, too
BATCH, CONTEXT, PROMPT = 8, 2048, 512
LONG = (("v5e:2x4", "qwen2.5-7b", (1, 4, 2), 1, 131072), ("v6e:2x2", "qwen2.5-7b", (1, 2, 2), 8, 32768))
KERNEL_KEYS = ("chip", "model", "kernel", "rows", "bits")


def main(names: tuple[str, ...], table: dict) -> None:
    """Fills the table line by line, so that an interrupted run leaves what it has; lines that are there are kept."""
    programs = {(line["model"], line["topology"], line["prompt"]) for line in table["programs"]}
    long = {(line["model"], line["mesh"]) for line in table.setdefault("long", [])}
    for text, name, sizes, batch, context in LONG:
        topology, settings = chips.parse(text), {"batch": batch, "context": context, "kv_bits": 8}
        found = plan.estimate(MODELS[name], Storage(), topology, *sizes[:2], sequence=sizes[2], **settings)
        if name in names and (name, found.mesh) not in long:
            line = _program(name, topology, found, None, settings)
            table["long"].append(line | {"batch": batch, "context": context})
            write(table)
    compiled = {tuple(line[key] for key in KERNEL_KEYS) for line in table["kernels"]}
    for chip, topologies in TOPOLOGIES.items():
        for name in names:
            config = MODELS[name]
            settings = {"batch": BATCH, "context": CONTEXT, "kv_bits": 8}
            for text in topologies:
                topology = chips.parse(text)
                best = next(p for p in plan.plans(config, Storage(), topology, **settings) if p.sequence == 1)
                for prompt in (None, PROMPT) if name in PREFILLED else (None,):
                    if best.fits and (name, text, prompt) not in programs:
                        table["programs"].append(_program(name, topology, best, prompt, settings))
                        write(table)
            for what, (inputs, outputs) in kernels.projections(config).items():
                for bits, rows in ((4, 1), (4, 64), (8, 8), (4, 2048)):
                    key = (chip, name, what, rows, bits)
                    if key not in compiled:
                        found = kernels.compile_matmul(chip, inputs, outputs, rows, bits)
                        table["kernels"].append(dict(zip(KERNEL_KEYS, key, strict=True)) | dataclasses.asdict(found))
            for bits in (8, 16):
                key = (chip, name, "append, attend_decode", BATCH, bits)
                if key not in compiled:
                    found = kernels.compile_attention(chip, config, BATCH, CONTEXT, bits)
                    table["kernels"].append(dict(zip(KERNEL_KEYS, key, strict=True)) | dataclasses.asdict(found))
            write(table)


def _program(name: str, topology: chips.Topology, best: plan.Plan, prompt: int | None, settings: dict) -> dict:
    mesh = aot.mesh_of(topology, best.data, best.model, best.sequence)
    compiled = aot.compile_step(MODELS[name], Storage(), mesh, topology.chip.kind, prompt=prompt, **settings)
    line = {"model": name, "topology": str(topology), "mesh": best.mesh, "prompt": prompt}
    line |= dataclasses.asdict(compiled) | {"tokens_per_second_at_best": best.tokens_per_second}
    return line | {"fits": aot.fits(compiled, topology)}


def empty() -> dict:
    """A table without lines, of today and of these versions."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {"date": datetime.date.today().isoformat(), "versions": versions, "programs": [], "kernels": []}


def begun() -> dict:
    """The table as it is, or an empty one where that was made with other versions."""
    path = RESULTS / "aot.json"
    table = json.loads(path.read_text()) if path.exists() else empty()
    return table if table["versions"] == empty()["versions"] else empty()


def _cells(cells: list[str], line: dict) -> str:
    copied = sum(size for _, size in line["copies"])
    copies = f"{copied / 1e6:.0f} MB" if copied else "none"
    return f"| {' | '.join([*cells, copies, 'yes' if line['fits'] else 'no'])} |"


def write(table: dict) -> None:
    """Both files, in whole."""
    (RESULTS / "aot.json").write_text(json.dumps(table, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    lines = [
        "# Compiled ahead of time for TPUs",
        "",
        f"{table['date']}, {versions}. Int4 weights (groups of 128), 16-bit head, 8-bit cache, batch {BATCH}, room for "
        f"{CONTEXT} tokens a row. GB of each chip. Nothing here ran on a TPU: `python benchmarks/aot/refresh.py`.",
        "",
        "| model | chips | mesh | program | weights | cache | arguments | temporaries | copies of either | fits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {text: place for place, text in enumerate(text for pair in TOPOLOGIES.values() for text in pair)}
    for line in sorted(table["programs"], key=lambda line: (order[line["topology"]] // 2, NAMES.index(line["model"]))):
        sizes = (f"{line[key] / 1e9:.2f}" for key in ("weights", "cache", "arguments", "temporaries"))
        program = f"prefill, {line['prompt']} tokens a row" if line["prompt"] else "decode"
        lines.append(_cells([line["model"], line["topology"], line["mesh"], program, *sizes], line))
    lines += [
        "",
        "Long caches, split along their length over the third axis of the mesh; a step of decode.",
        "",
        "| model | chips | mesh | rows | tokens a row | weights | cache | arguments | temporaries | copies | fits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in table["long"]:
        sizes = (f"{line[key] / 1e9:.2f}" for key in ("weights", "cache", "arguments", "temporaries"))
        what = [line["model"], line["topology"], line["mesh"], str(line["batch"]), str(line["context"])]
        lines.append(_cells([*what, *sizes], line))
    compiled = table["kernels"]
    worst = max((line["temporaries"] for line in compiled if line["rows"] <= 64), default=0)
    copying = [line for line in compiled if line["copies"]]
    lines += [
        "",
        f"{len(compiled)} kernels at true shapes compiled ({', '.join(sorted({line['chip'] for line in compiled}))}); "
        f"{len(copying)} of them with a copy of weight or cache; at most {worst / 1e6:.1f} MB of temporaries for "
        "up to 64 rows.",
    ]
    (RESULTS / "aot.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="7B and 72B alone")
    parser.add_argument("--missing", action="store_true", help="keep the lines that the table has")
    options = parser.parse_args()
    main(("qwen-7b", "qwen-72b") if options.quick else NAMES, begun() if options.missing else empty())

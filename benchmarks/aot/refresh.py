"""Compiles every TPU kernel at true shapes and whole programs, without a TPU, and writes the table of what they take.

    python benchmarks/aot/refresh.py            all of it, about 20 minutes on two cores
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


def main(quick: bool) -> None:
    """Fills the table line by line, so that an interrupted run leaves what it has."""
    names = ("qwen-7b", "qwen-72b") if quick else NAMES
    table = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "programs": [],
        "kernels": [],
    }
    for chip, (alone, together) in TOPOLOGIES.items():
        for name in names:
            config = MODELS[name]
            settings = {"batch": BATCH, "context": CONTEXT, "kv_bits": 8}
            for text in (alone, together):
                topology = chips.parse(text)
                best = plan.plans(config, Storage(), topology, **settings)[0]
                if not best.fits:
                    continue
                mesh = aot.mesh_of(topology, best.data, best.model)
                for prompt in (None, PROMPT) if name in PREFILLED else (None,):
                    compiled = aot.compile_step(config, Storage(), mesh, topology.chip.kind, prompt=prompt, **settings)
                    line = {"model": name, "topology": text, "mesh": f"{best.data}x{best.model}", "prompt": prompt}
                    line |= dataclasses.asdict(compiled) | {"tokens_per_second_at_best": best.tokens_per_second}
                    table["programs"].append(line | {"fits": aot.fits(compiled, topology)})
                    write(table)
            for what, (inputs, outputs) in kernels.projections(config).items():
                for bits, rows in ((4, 1), (4, 64), (8, 8), (4, 2048)):
                    found = kernels.compile_matmul(chip, inputs, outputs, rows, bits)
                    line = {"chip": chip, "model": name, "kernel": what, "rows": rows, "bits": bits}
                    table["kernels"].append(line | dataclasses.asdict(found))
            for bits in (8, 16):
                found = kernels.compile_attention(chip, config, BATCH, CONTEXT, bits)
                line = {"chip": chip, "model": name, "kernel": "append, attend_decode", "rows": BATCH, "bits": bits}
                table["kernels"].append(line | dataclasses.asdict(found))
            write(table)


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
    for line in table["programs"]:
        sizes = (f"{line[key] / 1e9:.2f}" for key in ("weights", "cache", "arguments", "temporaries"))
        program = f"prefill, {line['prompt']} tokens a row" if line["prompt"] else "decode"
        copied = sum(size for _, size in line["copies"])
        cells = [line["model"], line["topology"], line["mesh"], program, *sizes]
        cells += [f"{copied / 1e6:.0f} MB" if copied else "none", "yes" if line["fits"] else "no"]
        lines.append(f"| {' | '.join(cells)} |")
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
    main(parser.parse_args().quick)

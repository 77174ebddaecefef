"""`qwen-jax bench decode --mesh … --check` on eight simulated CPU devices: what is read and what comes out.

    python benchmarks/simulated_meshes.py      writes benchmarks/results/simulated_meshes.md, in some 10 minutes

The model is small and has Qwen2.5-7B's heads: 28 over four key/value heads, so that eight devices have copies of them
and places for query heads that are empty.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
import textwrap

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}

from qwen_jax import cli  # noqa: E402
from qwen_jax.bench.models import MODELS  # noqa: E402

RESULT = pathlib.Path(__file__).parent / "results" / "simulated_meshes.md"
MESHES = ("1x2", "1x4", "2x2", "1x8", "2x4", "1x4x2", "1x1x8")
SMALL = dict(vocab_size=4096, hidden_size=512, intermediate_size=1280, num_layers=4, head_dim=32)


def measured(mesh: str) -> tuple[dict, list[dict]]:
    """The environment and the lines of one mesh."""
    numbers = [f"--bits={bits}" for bits in (4, 16)] + [f"--batch={rows}" for rows in (1, 8)]
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "out.json"
        settings = ["--context=512", "--rounds=1", "--dtype=float32", "--check", f"--output={output}"]
        try:
            cli.main(["bench", "decode", "--model=small", f"--mesh={mesh}", *numbers, *settings])
        except SystemExit as end:
            if end.code:
                raise
        found = json.loads(output.read_text())
    return found["environment"], found["results"]


def write(environment: dict, lines: list[dict]) -> None:
    """The page."""
    about = (
        f"JAX {environment['jax']}, eight simulated CPU devices, by `python benchmarks/simulated_meshes.py`: the "
        "benchmark of several cards, on a small model (4 layers, hidden size 512) with Qwen2.5-7B's 28 query heads "
        "over 4 key/value heads, random weights, float32, 8-bit cache, 512 tokens of context. Sixteen greedy tokens "
        "against the same model on one device (random models repeat themselves; `tests/qwen_jax/bench/test_mesh.py` "
        "compares sampled ones, `test_sharding.py` logits); MB that a device reads for a step. Times of simulated "
        "devices say nothing and are left out."
    )
    text = f"# Meshes of simulated devices, {environment['date'].partition(' ')[0]}\n\n{textwrap.fill(about, 120)}\n\n"
    text += "| mesh | bits | rows | MB a device | tokens |\n|---|---|---|---|---|\n"
    for line in lines:
        cells = [line["mesh"], line["bits"], line["batch"], f"{line['bytes_per_step'] / 1e6:.2f}", line["same_tokens"]]
        text += f"| {' | '.join(map(str, cells))} |\n"
    RESULT.write_text(text)


def main() -> None:
    """Every mesh, the page written after each."""
    layers = SMALL["num_layers"]
    MODELS["small"] = dataclasses.replace(MODELS["qwen2.5-7b"], **SMALL, sliding_layers=(False,) * layers)
    lines = []
    for mesh in MESHES:
        environment, found = measured(mesh)
        lines += found
        write(environment, lines)


if __name__ == "__main__":
    main()

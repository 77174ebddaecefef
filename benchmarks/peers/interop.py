"""Logits of a quantized folder by one reader, or the difference between two readers' logits.

    python benchmarks/peers/interop.py qwen-jax ours.npz FOLDER…          # in our environment
    python benchmarks/peers/interop.py gptqmodel theirs.npz FOLDER…       # in one with GPTQModel and PyTorch
    python benchmarks/peers/interop.py compressed-tensors theirs.npz FOLDER…   # … transformers, compressed-tensors
    python benchmarks/peers/interop.py compare ours.npz theirs.npz

Both sides compute in float32 on the CPU, on 64 fixed token ids.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

IDS = np.random.default_rng(5).integers(100, 20000, (1, 64))


def qwen_jax_logits(folder: str) -> np.ndarray:
    """By this project."""
    from qwen_jax import QwenForCausalLM

    return np.asarray(QwenForCausalLM.from_pretrained(folder, dtype="float32")(IDS))


def gptqmodel_logits(folder: str) -> np.ndarray:
    """By GPTQModel's own layers in PyTorch."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)  # it takes no float32
    return torch_logits(model.model)


def compressed_tensors_logits(folder: str) -> np.ndarray:
    """By transformers, which lets the package compressed-tensors unpack the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    return torch_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def torch_logits(model) -> np.ndarray:
    """Float32 logits of a PyTorch model."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor(IDS)).logits.float().numpy()


READERS = {
    "qwen-jax": qwen_jax_logits,
    "gptqmodel": gptqmodel_logits,
    "compressed-tensors": compressed_tensors_logits,
}


def compare(one: Path, other: Path) -> bool:
    """Prints a line a folder; whether all agree: relative norm of the difference below 1 %, the same top tokens."""
    left, right = np.load(one), np.load(other)
    agree = True
    for name in right.files:
        a, b = (each[name].astype(np.float64) for each in (left, right))
        difference = np.linalg.norm(a - b) / np.linalg.norm(a)
        top = (a.argmax(-1) == b.argmax(-1)).mean()
        agree &= bool(difference < 1e-2 and top > 0.98)
        print(f"{name:28} relative difference {difference:.1e}, same top token {top:.1%}")
    return agree


def main() -> None:
    """Runs one reader, or compares two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*READERS, "compare"])
    parser.add_argument("paths", nargs="+", help="the file to write and folders to read, or two files to compare")
    arguments = parser.parse_args()
    if arguments.reader == "compare":
        sys.exit(not compare(*map(Path, arguments.paths)))
    output, *folders = arguments.paths
    found = {}
    for folder in folders:
        try:
            found[Path(folder).name] = READERS[arguments.reader](folder)
        except Exception as error:  # another program's refusal of one folder is a result too
            print(f"{folder}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
    np.savez(output, **found)


if __name__ == "__main__":
    main()

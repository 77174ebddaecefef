"""A peer on an NVIDIA GPU: Humming's int4 matmul (vLLM prefers it on Hopper), group 128, bfloat16 activations.

    pip download --no-deps humming-kernels==0.1.19     # a wheel; its kernels are compiled by nvcc when first called
    python benchmarks/peers/humming_matmul.py --wheel humming_kernels-0.1.19-….whl --shapes 4096x11008 --rows 1 16 64

Timed as `torch_matmul.py` does it. Kernels of all shapes are compiled at once by processes of their own, into Humming's
cache, before the first is timed. Exit code 3 and one line where the wheel, nvcc or a GPU is missing.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

# Named before torch is imported: a missing part is told in one line.
SHAPES = ("4096x11008", "4096x12288", "11008x4096", "2048x5504", "8192x24576")


def unpack(wheel: pathlib.Path) -> pathlib.Path:
    """The wheel's content in a new folder; its native programs may be executed."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="humming-"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for file in (folder / "humming" / "_native").rglob("*"):
        file.chmod(0o755)
    return folder


def layer(in_features: int, out_features: int):
    """A layer of random weights."""
    import torch
    from humming.layer import HummingLayer

    config = {"dtype": "uint4", "group_size": 128}
    made = HummingLayer(
        shape_n=out_features, shape_k=in_features, weight_config=config, torch_dtype=torch.bfloat16
    ).cuda()
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) / in_features**0.5
    made.load_from_unquantized(weight)
    made.transform()
    return made


def calls(rows: int, in_features: int, out_features: int, count: int):
    """Calls with different weights; the layers of a shape are made once."""
    import torch

    if (in_features, out_features) not in _LAYERS:
        _LAYERS.clear()
        _LAYERS[in_features, out_features] = [layer(in_features, out_features) for _ in range(count)]
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    return [lambda made=made: made(x) for made in _LAYERS[in_features, out_features]]


_LAYERS: dict = {}


def main() -> None:
    """Measures every shape and number of rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=pathlib.Path, help="default: the installed package")
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16, 64, 256, 2048])
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help="its cache holds the kernels: compile none first")
    parser.add_argument("--patience", type=float, default=150, help="seconds that compiling may take")
    arguments = parser.parse_args()
    environment = dict(os.environ)
    if arguments.wheel is not None:
        if not arguments.wheel.is_file():
            parser.exit(3, f"humming_matmul.py: skipped: there is no file {arguments.wheel}.\n")
        folder = unpack(arguments.wheel)
        sys.path.insert(0, str(folder))
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    for found, name in (
        (importlib.util.find_spec("humming"), "the package humming (--wheel FILE, or pip install humming-kernels)"),
        (shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc"), "nvcc"),
        (importlib.util.find_spec("torch"), "torch"),
    ):
        if not found:
            parser.exit(3, f"humming_matmul.py: skipped: {name} is missing.\n")
    import torch

    if not torch.cuda.is_available():
        parser.exit(3, "humming_matmul.py: skipped: no CUDA device.\n")
    if arguments.compile_only:
        for shape in arguments.shapes:
            in_features, out_features = map(int, shape.split("x"))
            made = layer(in_features, out_features)
            for rows in arguments.rows:
                made(torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16))
        torch.cuda.synchronize()
        return
    from torch_matmul import report

    rows = [str(count) for count in arguments.rows]
    command = [sys.executable, __file__, "--compile-only", "--rows", *rows, "--shapes"]
    shapes = [] if arguments.compiled else arguments.shapes
    workers = [subprocess.Popen([*command, shape], env=environment) for shape in shapes]
    for worker in workers:
        try:
            worker.wait(arguments.patience)
        except subprocess.TimeoutExpired:
            worker.kill()
    for shape in arguments.shapes:
        in_features, out_features = map(int, shape.split("x"))
        for count in arguments.rows:
            report("humming", in_features, out_features, count, calls, in_features * out_features / 2)


if __name__ == "__main__":
    main()

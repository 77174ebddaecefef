"""Runs notebooks from top to bottom and writes them with their outputs: `make notebooks`, or some of them by name.

    python scripts/notebooks.py                            # all, in place
    python scripts/notebooks.py 01_chat --output /tmp/run  # a copy of one
    python scripts/notebooks.py 01_chat --output /tmp/run --set MAX_NEW_TOKENS=8  # with another parameter

Each runs in an empty folder, with a kernel of its own, and stops at the first cell that raises. What it was run from is
kept in its metadata as a hash of its code cells, so that a test sees outputs that are older than the code.
"""

import argparse
import ast
import hashlib
import os
import pathlib
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from qwen_jax.cli import _pass_over_absent_tpu

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
CELL_SECONDS = 600


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of all code cells."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def set_parameters(notebook: nbformat.NotebookNode, values: dict[str, str]) -> None:
    """Gives constants of the second code cell, the parameters, other values, in place.

    Args:
        notebook: changed.
        values: Python literals by name.

    Raises:
        ValueError: a name that is no parameter.
    """
    cell = [cell for cell in notebook.cells if cell.cell_type == "code"][1]
    lines = cell.source.splitlines()
    for node in ast.parse(cell.source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in values:
            name = node.targets[0].id
            lines[node.lineno - 1] = f"{name} = {values.pop(name)}"
    if values:
        raise ValueError(f"--set names {', '.join(values)}, which its parameters are not; they are\n{cell.source}")
    cell.source = "\n".join(lines)


def execute(notebook: nbformat.NotebookNode, kernel: str = "python3") -> float:
    """Fills in the outputs, in place; the seconds it took.

    Raises:
        CellExecutionError: a cell raised; its traceback is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name=kernel,
            extra_arguments=["--log-level=ERROR"],  # not that other users of this machine could listen to the kernel
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,  # a streamed answer is one text, also where it is shown on the web
        )
        start = time.perf_counter()
        # tqdm would have its bars as widgets, which no saved notebook shows; its warning holds a path of this machine.
        client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})
        seconds = time.perf_counter() - start
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["qwen_jax"] = {"source_sha256": source_hash(notebook), "seconds": round(seconds, 1)}
    return seconds


def main() -> int:
    """Runs what the command line names; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, as 01_chat; default: all")
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER, help="where to write them; default: in place")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another value of a parameter, with --output"
    )
    arguments = parser.parse_args()
    if arguments.set and arguments.output == FOLDER:
        parser.error("--set changes the notebook; give --output, so that the original stays")
    _pass_over_absent_tpu()  # kernels inherit the environment
    failed = 0
    for name in arguments.names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        set_parameters(notebook, dict(each.split("=", 1) for each in arguments.set))
        try:
            seconds = execute(notebook)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
            continue
        arguments.output.mkdir(parents=True, exist_ok=True)
        target = arguments.output / f"{name}.ipynb"
        nbformat.write(notebook, target)
        print(f"{name}: {seconds:.1f} s, {target.stat().st_size / 1000:.0f} kB", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

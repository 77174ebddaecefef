"""Ours and the peers on one Hopper GPU in one call: one JSON, with progress as it comes.

    python benchmarks/hopper.py --wheel .whl/humming_kernels-*.whl --output h100.json
    python benchmarks/hopper.py --only matmul torch_matmul --output matmul.json

Every part is a process of its own with a time limit, so that its memory comes back; one that fails is reported, and the
others go on. Ours compile side by side from the start and take turns on the device; then come the peers, one after the
other. Humming's kernels, which take nvcc a minute, are compiled from the start too, at the lowest priority.
`qwen-jax bench report` draws the result.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]

from targets import mark  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 64, 256, 2048)
SHAPES = ("4096x11008", "4096x12288", "11008x4096", "2048x5504", "8192x24576")
MODELS = {"1.8B": "qwen-1.8b", "7B": "qwen-7b", "14B": "qwen-14b", "72B": "qwen-72b"}
PYTHON = sys.executable


class Part(NamedTuple):
    """A process: its command, the seconds that it may run, and whether it prints a peer's records."""

    command: list[str]
    limit: float
    peer: bool = False


def many(option: str, values) -> list[str]:
    """`--rows 1 --rows 16`."""
    return [word for value in values for word in (option, str(value))]


def parts(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Part]:
    """All parts by name; peers in the order in which they run."""
    shapes, rows = options.shapes, options.rows
    words = [str(count) for count in rows]
    bench, peers = [PYTHON, "-m", "qwen_jax", "bench"], ROOT / "benchmarks" / "peers"
    found = {
        "torch_matmul": Part([PYTHON, str(peers / "torch_matmul.py"), "--shapes", *shapes, "--rows", *words], 90, True),
        "torch_decode": Part(
            [PYTHON, str(peers / "torch_decode.py"), "--models", "7B", "--batch", "1", "32", "--modes", "compiled"],
            150,
            True,
        ),
        "humming": Part(
            [PYTHON, str(peers / "humming_matmul.py"), "--compiled", "--shapes", *shapes, "--rows", *words], 90, True
        ),
        "matmul": Part([*bench, "matmul", *many("--shape", shapes), *many("--rows", rows)], options.patience),
        "matmul_int8": Part(
            [*bench, "matmul", "--bits", "8", *many("--shape", shapes), *many("--rows", [r for r in rows if r <= 64])],
            options.patience,
        ),
        "matmul_xla": Part(
            [*bench, "matmul", "--kernels", "xla", *many("--shape", shapes), "--rows", "1"], options.patience
        ),
        "attention": Part(
            [*bench, "attention", *many("--batch", options.batch), *many("--context", options.context)],
            options.patience,
        ),
    }
    for name in options.models:
        batch = ["1", *(["8", "32"] if name in ("7B", "14B") else [])]
        command = [PYTHON, str(ROOT / "benchmarks" / "whole_model.py"), "--model", MODELS[name], "--batch", *batch]
        command += ["--patience", str(options.patience), *(["--prefill"] if name == "7B" else [])]
        found[name] = Part(command, options.patience)
    for name, part in found.items():
        if not part.peer:
            part.command.extend(["--output", str(folder / f"{name}.json")])
    return found


def compiling(options: argparse.Namespace) -> dict[str, list[str]]:
    """Commands that fill Humming's cache, by name."""
    if "humming" not in options.only:
        return {}
    script, halves = str(ROOT / "benchmarks" / "peers" / "humming_matmul.py"), (options.rows[:4], options.rows[4:])
    return {
        f"humming compiles {shape}, {rows[0]} to {rows[-1]} rows": [
            *(PYTHON, script, "--compile-only", "--shapes", shape, "--rows"),
            *map(str, rows),
        ]
        for shape in options.shapes
        for rows in halves
        if rows
    }


class Run:
    """Processes, their logs, and what came of them."""

    def __init__(self, folder: pathlib.Path, environment: dict[str, str]):
        self.folder, self.environment, self.begin = folder, environment, time.monotonic()
        self.states: dict[str, dict[str, Any]] = {}

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self.begin:6.1f} s  {text}", flush=True)

    def start(self, name: str, command: list[str]) -> subprocess.Popen:
        """Starts a process of its own group, its output in a file."""
        self.states[name] = {"started_s": round(time.monotonic() - self.begin, 1), "state": "running"}
        with open(self.folder / f"{name}.log", "w") as log:
            return subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )

    def wait(self, name: str, process: subprocess.Popen, until: float) -> None:
        """Waits until the process ends, or ends it at `until` (of time.monotonic)."""
        try:
            code = process.wait(max(0.1, until - time.monotonic()))
            state = "done" if code == 0 else f"ended with {code}: {self.last_line(name)}"
        except subprocess.TimeoutExpired:
            end(process)
            state = f"not done in its time, ended: {self.last_line(name)}"
        took = time.monotonic() - self.begin - self.states[name]["started_s"]
        self.states[name] |= {"state": state, "seconds": round(took, 1)}
        self.say(f"{name}: {state} ({took:.0f} s)")

    def last_line(self, name: str) -> str:
        """Of its log."""
        lines = [
            line for line in (self.folder / f"{name}.log").read_text(errors="replace").splitlines() if line.strip()
        ]
        return lines[-1][:200] if lines else "nothing printed"

    def sets(self, name: str, peer: bool, facts: dict) -> list[dict]:
        """What a part measured, also where it did not end well."""
        if not peer:
            file = self.folder / f"{name}.json"
            found = json.loads(file.read_text()) if file.is_file() else []
            return found if isinstance(found, list) else [found]
        lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        records = [json.loads(line) for line in lines if line.startswith('{"peer"')]
        for record in records:
            if "model" in record:
                record["model"] = MODELS[record["model"]]
        kinds = dict.fromkeys(record["kind"] for record in records)
        return [
            {
                "kind": kind,
                "environment": facts | {"torch": records[0].get("torch", "")},
                "copy_gigabytes_per_second": None,
                "results": [record for record in records if record["kind"] == kind],
            }
            for kind in kinds
        ]


def end(process: subprocess.Popen) -> None:
    """Ends a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def card() -> dict[str, str]:
    """Of the first GPU, without starting JAX here."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {"device": "unknown", "driver": "unknown"}
    name, driver = (cell.strip() for cell in line.split(","))
    command = " ".join(["python", "benchmarks/hopper.py", *sys.argv[1:]])
    return {
        "device": name,
        "driver": driver,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": command,
    }


def main() -> None:
    """Runs the parts asked for; exit code 1 where one of them did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["torch_matmul", "torch_decode", "humming", "matmul", "matmul_int8", "matmul_xla", "attention", *MODELS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--wheel", type=pathlib.Path, help="of Humming; default: the installed package")
    parser.add_argument("--limit", type=float, default=420, help="seconds of the whole run")
    parser.add_argument("--share", type=float, default=0.6, help="of the limit, after which ours leave it to the peers")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="of the matmuls")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 8, 32), help="of attention")
    parser.add_argument("--context", nargs="+", type=int, default=(2048, 16384), help="of attention")
    parser.add_argument("--logs", type=pathlib.Path, help="a folder for what parts print; default: a passing one")
    options = parser.parse_args()
    options.patience, options.models = options.limit, [name for name in MODELS if name in options.only]
    with tempfile.TemporaryDirectory(prefix="hopper-") as name:
        folder = pathlib.Path(name) if options.logs is None else options.logs.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run_parts(options, folder)


def run_parts(options: argparse.Namespace, folder: pathlib.Path) -> None:
    """Prepares, takes turns, collects."""
    facts = card()
    paths = [str(ROOT)]
    if options.wheel is not None and "humming" in options.only:
        from humming_matmul import unpack  # pyright: ignore[reportMissingImports]  (in peers/)

        paths.append(str(unpack(options.wheel)))
    environment = {**os.environ, "QWEN_JAX_BENCH_TURNS": str(folder), "PYTHONUNBUFFERED": "1"}
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".93"}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    run = Run(folder, environment)
    chosen = {name: part for name, part in parts(options, folder).items() if name in options.only}
    finish = run.begin + options.limit
    ours = {name: run.start(name, part.command) for name, part in chosen.items() if not part.peer}
    peers = {name: part for name, part in chosen.items() if part.peer}
    preparing = {name: run.start(name, ["nice", "-n", "19", *command]) for name, command in compiling(options).items()}
    run.say(f"{len(ours)} parts and {len(preparing)} preparations started")
    until = run.begin + options.limit * (options.share if peers else 1)
    try:
        for name, process in ours.items():
            run.wait(name, process, until)
            write(options.output, run, chosen, facts)
        for name, part in peers.items():
            if name == "humming":
                for other, process in preparing.items():
                    run.wait(other, process, finish - 30)
            run.wait(name, run.start(name, part.command), min(finish, time.monotonic() + part.limit))
            write(options.output, run, chosen, facts)
    finally:
        for process in [*ours.values(), *preparing.values()]:
            end(process)
    write(options.output, run, chosen, facts)
    failed = [name for name, state in run.states.items() if state["state"] != "done"]
    run.say(f"not well: {', '.join(failed)}" if failed else "all parts done")
    for name in failed:
        print(f"--- {name}\n" + "\n".join((folder / f"{name}.log").read_text(errors="replace").splitlines()[-12:]))
    sys.exit(bool(failed))


def write(output: pathlib.Path, run: Run, chosen: dict[str, Part], facts: dict) -> None:
    """All that there is so far."""
    sets = [one for name, part in chosen.items() if name in run.states for one in run.sets(name, part.peer, facts)]
    mark(sets)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"environment": facts, "parts": run.states, "sets": sets}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Jobs in processes of their own: compiled side by side, timed one after another.

Tracing and lowering kernels is Python's work, which threads of one process do not share. A worker is this module's
function `main` in a fresh interpreter: it gets jobs as JSON, prints one JSON line a record.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
type Record = dict[str, Any]
type Worker = Callable[[Sequence[Record], "Turn"], Iterator[Record]]


class Turn:
    """`with turn:` waits until every worker is ready (at most `patience` seconds), then for the device.

    Whoever runs several benchmarks side by side names a folder in QWEN_JAX_BENCH_TURNS: they then share the device's
    lock there.
    """

    def __init__(self, folder: str | None = None, workers: int = 1, patience: float = 0.0):
        self.folder, self.workers, self.patience = folder, workers, patience
        self._lock: Any = None

    def __enter__(self) -> None:
        deadline = time.monotonic() + self.patience
        shared = os.environ.get("QWEN_JAX_BENCH_TURNS")
        if self.folder is not None:
            ready = pathlib.Path(self.folder) / "ready"
            ready.mkdir(exist_ok=True)
            (ready / str(os.getpid())).touch()
            while len(list(ready.iterdir())) < self.workers and time.monotonic() < deadline:
                time.sleep(0.1)
        if (folder := shared or self.folder) is not None:
            self._lock = open(pathlib.Path(folder) / "device.lock", "w")  # noqa: SIM115
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.close()


def environment() -> dict[str, str]:
    """Of a worker: this repository or installation first on its path, device memory taken as it is needed."""
    settings = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".93", **os.environ}
    settings |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), settings.get("PYTHONPATH")]))
    return settings


def leave_memory() -> None:
    """Keeps this process from taking most of a GPU's memory when JAX starts in it: its workers need it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def run(module: str, worker: Worker, jobs: Sequence[Record], patience: float = 120.0) -> list[Record]:
    """Records of all jobs; on a CPU, or for one job, from this process.

    Args:
        module: that runs as a worker: `python -m module JOBS` calls `main(worker)`.
        worker: as called by it.
        jobs: what it takes, in JSON.
        patience: seconds that workers wait for each other before the first is timed.
    """
    leave_memory()
    if len(jobs) == 1 or jax.default_backend() == "cpu":
        return list(worker(jobs, Turn()))
    count = min(len(jobs), os.cpu_count() or 1)
    shares = [list(jobs[number::count]) for number in range(count)]
    records = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        turn = {"folder": folder, "workers": count, "patience": patience}
        processes = []
        for share in shares:
            command = [sys.executable, "-m", module, json.dumps({"turn": turn, "jobs": share})]
            process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            processes.append(process)
        for share, process in zip(shares, processes, strict=True):
            output = process.communicate()[0]
            records += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            if process.returncode:
                failed = f"its process ended with {process.returncode}"
                records += [{**facts(job), "failed": failed} for job in share if not _found(job, records)]
    return records


def run_with_copy(
    module: str, worker: Worker, jobs: Sequence[Record], patience: float = 120.0
) -> tuple[float, list[Record]]:
    """As `run` for workers that also yield {"copy": GB/s}: (the median of their copies, the other records)."""
    records = run(module, worker, jobs, patience)
    copies = [record["copy"] for record in records if "copy" in record]
    records = [record for record in records if "copy" not in record]
    if not copies:
        raise RuntimeError(f"bench {module.rpartition('.')[2]}: no process measured anything: {records[0]['failed']}.")
    return statistics.median(copies), records


def facts(job: Mapping[str, Any]) -> Record:
    """What names a job in a record: its plain entries."""
    return {key: value for key, value in job.items() if isinstance(value, str | int | float)}


def _found(job: Mapping[str, Any], records: Sequence[Record]) -> bool:
    named = facts(job)
    return any(named.items() <= record.items() for record in records)


def main(worker: Worker) -> None:
    """Runs the jobs that the command line holds, printing records as they come."""
    given = json.loads(sys.argv[1])
    for record in worker(given["jobs"], Turn(**given["turn"])):
        print(json.dumps(record), flush=True)

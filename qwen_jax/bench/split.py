"""What a device does during a step, from the profiler: how long it is busy, and how long in reductions."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

REDUCTIONS = re.compile("all-?reduce|all-?gather|psum|nccl|card_sums", re.IGNORECASE)
ONE_LAUNCH = re.compile("decode_step")


def kernels(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel of the first GPU while `run` runs and its results come; empty on other devices."""
    busy: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(files[-1])).planes if files else ()
        plane = next((plane for plane in planes if plane.name.startswith("/device:GPU:")), None)
        for line in plane.lines if plane else ():
            for event in line.events if "Stream" in line.name else ():
                busy[event.name] += event.duration_ns / 1e6
    return dict(busy)


def of_step(busy: dict[str, float], steps: int) -> dict[str, float | None]:
    """{"busy_ms", "reductions_ms", "launch_ms"} of a step: all kernels, the reductions, and the one launch.

    A reduction waits for the other devices: its time holds how far they are apart. The one launch adds its own sums.
    Without kernels all are None.
    """
    parts = {"busy_ms": re.compile(""), "reductions_ms": REDUCTIONS, "launch_ms": ONE_LAUNCH}
    if not busy:
        return dict.fromkeys(parts)
    return {key: round(sum(ms for name, ms in busy.items() if p.search(name)) / steps, 4) for key, p in parts.items()}

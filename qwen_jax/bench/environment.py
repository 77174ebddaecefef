"""What a measurement was made on: device, versions, date, and the copy bandwidth of the same run."""

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp


def environment() -> dict[str, str]:
    """Device, driver, versions and date, for the head of a result."""
    device = jax.devices()[0]
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "driver": _driver() if device.platform == "gpu" else "",
        "python": platform.python_version(),
        **packages,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "qwen-jax " + " ".join(sys.argv[1:]),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def copy_bandwidth(megabytes: int = 1024, rounds: int = 10) -> float:
    """Bytes read plus bytes written a second by a copy on the device, median: the ceiling of memory-bound work."""
    source = jnp.arange(megabytes * 2**18, dtype=jnp.int32)
    copy = jax.jit(lambda array, one: array + one)  # a plain copy may be done by reference
    seconds = []
    for round_number in range(rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(copy(source, round_number))
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds[2:])

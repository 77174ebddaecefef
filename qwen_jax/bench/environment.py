"""What a measurement was made on: device, driver, versions, date and command."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys

import jax


def environment(command: str | None = None) -> dict[str, str]:
    """Device, driver, versions, date and command, for the head of a result; `command`: by default this process's."""
    device = jax.devices()[0]
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "driver": _driver() if device.platform == "gpu" else "",
        "python": platform.python_version(),
        **packages,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command or "qwen-jax " + " ".join(sys.argv[1:]),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"

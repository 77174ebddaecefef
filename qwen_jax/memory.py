"""Peak memory, of the process and of the accelerator."""

import contextlib
import re
import sys


def reset_host_peak() -> None:
    """Starts a new measurement of `host_peak`, where the system can (Linux); elsewhere it goes on."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def host_peak() -> int:
    """Largest resident memory of this process in bytes, since `reset_host_peak` or the start."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        if match := re.search(r"VmHWM:\s*(\d+) kB", file.read()):
            return int(match.group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak() -> int | None:
    """Largest allocated memory of JAX's first device in bytes; None where it does not say (CPUs)."""
    import jax

    statistics = jax.devices()[0].memory_stats()
    return statistics.get("peak_bytes_in_use") if statistics else None

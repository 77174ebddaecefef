"""What all tests share: eight CPU devices, strict dtype promotion, quick compiling, a cache of it between runs."""

import os
import pathlib

from tests import demo_run

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What the demo makes is shared by all tests: see demo_run.py.
os.environ.setdefault("QWEN_JAX_CACHE", str(demo_run.folder()))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails instead of waiting

import jax
import pytest

CPU_DEVICES = 8
# Tests compile more than they compute. Read with the first device, and kept from processes that tests start: those work
# on whole models, which plain loops slow down.
QUICK_COMPILING = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_sessionstart(session):
    # Asserted, for a test over eight devices that silently runs on one proves nothing.
    with pytest.MonkeyPatch.context() as patch:
        if jax.config.jax_platforms == "cpu":
            patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILING}")
        count = len(jax.devices("cpu"))
    if count != CPU_DEVICES:
        raise pytest.UsageError(f"tests need {CPU_DEVICES} CPU devices, JAX was used before conftest.py: {count}")


def pytest_collection_modifyitems(items):
    backend = jax.default_backend()
    for item in items:
        for marker in ("gpu", "tpu"):
            if item.get_closest_marker(marker) and backend != marker:
                item.add_marker(pytest.mark.skip(reason=f"needs a {marker.upper()}, JAX runs on {backend}"))

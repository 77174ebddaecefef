"""What all tests share: eight CPU devices, strict dtype promotion, quick compiling, a cache of it between runs."""

import os
import pathlib

from tests import demo_run

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What the demo makes is shared by all tests: see demo_run.py.
os.environ.setdefault("QWEN_JAX_CACHE", str(demo_run.folder()))
# Its threads wait spinning, on cores that the other process of tests has work for. Also in processes that tests start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails instead of waiting

import jax
import pytest

CPU_DEVICES = 8
# A file is one process's work: the long ones come first, so that no process waits for them at the end. The very first
# makes the demo, which others of them need.
LONG = ("test_notebooks", "test_golden", "test_pipeline", "test_demo", "test_docs", "test_ahead_of_time")

jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tests compile more than they compute. Processes that they start work as users' do.
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_PLATFORMS"] == "cpu")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_sessionstart(session):
    # Asserted, for a test over eight devices that silently runs on one proves nothing.
    count = len(jax.devices("cpu"))
    if count != CPU_DEVICES:
        raise pytest.UsageError(f"tests need {CPU_DEVICES} CPU devices, JAX was used before conftest.py: {count}")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    backend = jax.default_backend()
    for item in items:
        for marker in ("gpu", "tpu"):
            if item.get_closest_marker(marker) and backend != marker:
                item.add_marker(pytest.mark.skip(reason=f"needs a {marker.upper()}, JAX runs on {backend}"))


@pytest.fixture(scope="module")
def optimized():
    """For modules that compute more than they compile, or look at what was compiled."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)

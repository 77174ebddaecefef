"""The training step compiled for TPUs that are not here: its memory, and that the TPU's kernels have derivatives."""

import argparse

import pytest

from qwen_jax.plan import aot


@pytest.mark.slow
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_7b_int4_takes_less_than_14_gb():
    finetune = pytest.importorskip("benchmarks.finetune", reason="benchmarks are not part of a source archive")
    settings = dict(model="qwen-7b", bits=4, group_size=128, rank=64, rows=4, length=1024, topology="v5p:1x1x1")
    found = finetune.compiled(argparse.Namespace(**settings))
    assert 5.8e9 < found["base_bytes"] < 5.9e9  # the packed weights, nothing of them in float
    assert found["peak_bytes"] < 14e9

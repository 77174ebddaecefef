"""A whole model with the TPU's kernels, interpreted: loaded, prefilled and decoded from an 8-bit cache."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chip import compiling_for
from qwen_jax import QwenForCausalLM

CASE = Path(__file__).parents[1] / "golden" / "qwen2-int4-g64-actorder-asym"
LIMIT = 0.035  # bfloat16 and an 8-bit cache; XLA on a CPU has 0.015 and 0.028, the kernels 0.014 and 0.029


@pytest.fixture
def as_on_a_tpu():
    # JAX reuses what was traced for other shapes of call, whatever the chip: nothing may be left over, on either side.
    jax.clear_caches()
    with compiling_for("TPU v6 lite"), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield
    jax.clear_caches()


def test_golden_logits(as_on_a_tpu):
    want = dict(np.load(CASE / "golden.npz"))
    model = QwenForCausalLM.from_pretrained(CASE / "quantized", dtype="bfloat16", use_cache_quantization=True)
    logits, cache = model.prefill(want["ids"])
    state = cache._peek()
    assert state.kv.quantized and state.kv.key_scales.dtype == np.int16
    assert model.decoder.blocks[0].mlp.down.weight.layout == "mosaic_tpu"
    assert error(logits, want["gptq_prefill"][:, -1:]) < LIMIT
    for step in range(2):
        logits, cache = model.decode(want["gptq_greedy"][:, step : step + 1], cache)
        assert error(logits[:, 0], want["gptq_decode"][:, step]) < LIMIT
    assert error(logits[:, 0], want["float_decode"][:, step]) > 2 * LIMIT  # the unquantized model is far away


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)

"""The whole model on a Hopper GPU, with its own kernels: golden tokens, and what the compiled decode step copies."""

import re

import jax
import numpy as np
import pytest

from qwen_jax import QwenForCausalLM
from qwen_jax.generation import Programs
from tests.qwen_jax.test_fused_decode import build as small_decoder
from tests.qwen_jax.test_golden import CASES, FOLDER, GOLDEN, golden, relative_error

pytestmark = pytest.mark.gpu
LOGITS = {"bfloat16": 4e-2, "float16": 4e-3}  # about twice what XLA's form gives on a CPU in the same dtype


def named(case: str) -> str:
    """The kernels asked for by name wherever they can run: the attention kernel has no head size of 48."""
    return "auto" if "tied" in case else "mosaic_gpu"


@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize("case", CASES)
def test_golden_tokens(case, dtype):
    want = golden(case)
    model = QwenForCausalLM.from_pretrained(GOLDEN / case / FOLDER["gptq"], dtype=dtype, kernels=named(case))
    assert relative_error(model(want["ids"]), want["gptq_prefill"]) < LOGITS[dtype]
    tokens = model.generate(want["ids"], max_new_tokens=8, do_sample=False, eos_token_id=[])
    np.testing.assert_array_equal(tokens[:, -8:], want["gptq_greedy"])


@pytest.mark.parametrize("case", CASES)
def test_8_bit_cache(case):
    """Teacher-forced decode logits over the 8-bit cache stay as close as those over the 16-bit one."""
    want = golden(case)
    errors = []
    for quantized in (False, True):
        model = QwenForCausalLM.from_pretrained(
            GOLDEN / case / FOLDER["gptq"], dtype="bfloat16", kernels=named(case), use_cache_quantization=quantized
        )
        _, cache = model.prefill(want["ids"])
        steps = []
        for step in range(want["gptq_greedy"].shape[1]):
            logits, cache = model.decode(want["gptq_greedy"][:, step : step + 1], cache)
            steps.append(np.asarray(logits)[:, 0])
        errors.append(relative_error(np.stack(steps, 1), want["gptq_decode"]))
    assert errors[0] < LOGITS["bfloat16"] and errors[1] < LOGITS["bfloat16"] + 2e-2


@pytest.mark.parametrize("quantized", [False, True])
def test_nothing_large_is_copied(quantized):
    model = QwenForCausalLM.from_pretrained(
        GOLDEN / "qwen1-int4-g32" / "quantized", dtype="bfloat16", use_cache_quantization=quantized
    )
    programs = model._programs
    cache = programs.empty_cache(1, 64, "bfloat16", quantized)
    token = np.zeros(1, np.int32)
    hlo = (
        programs._decode.func.lower(*programs._decode.args, programs._leaves, token, cache=cache, active_length=64)
        .compile()
        .as_text()
    )
    largest = min(leaf.size for leaf in (cache.kv.keys, *jax.tree.leaves(model.decoder)) if leaf.ndim >= 4)
    for shape in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", hlo):
        assert np.prod([int(size) for size in shape.split(",")]) < largest, shape


@pytest.mark.parametrize(
    "base, inner, rows, quantized",
    [
        ("qwen-7b", 2048, 1, True),
        ("qwen-7b", 2048, 8, True),
        ("qwen2.5-7b", 2048, 3, True),
        ("qwen3-8b", 2048, 1, False),
        ("qwen-7b", 2048, 4, False),
        ("qwen-7b", 16384, 8, True),  # x of down does not fit in shared memory
    ],
)
def test_one_launch_decodes_as_a_kernel_at_a_time(base, inner, rows, quantized):
    decoder = small_decoder(base, intermediate_size=inner)
    ids = np.random.default_rng(rows).integers(0, 256, (rows, 64)).astype(np.int32)
    lengths = np.arange(64, 64 - rows, -1, dtype=np.int32)
    steps = np.random.default_rng(9).integers(0, 256, (40, rows)).astype(np.int32)
    logits = {}
    for decoder.one_launch in (False, True):
        programs = Programs(decoder)
        _, cache = programs.prefill(ids, lengths, programs.empty_cache(rows, 128, "bfloat16", quantized))
        seen = []
        for tokens in steps:
            found, cache = programs.decode(tokens, cache, active_length=128)
            seen.append(np.asarray(found, np.float32))
        logits[decoder.one_launch] = np.stack(seen)
    one, each = logits[True], logits[False]
    assert relative_error(one, each) < LOGITS["bfloat16"]
    best = each.max(-1)
    chosen = np.take_along_axis(each, one.argmax(-1)[..., None], -1)[..., 0]
    assert np.all(best - chosen < 0.1 * each.std()), "another token, beyond what rounding explains"
    assert np.mean(best == chosen) > 0.95

"""The whole model against outputs of the original code, AutoGPTQ and GPTQModel (tests/golden)."""

import functools
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import QwenForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
LIMIT = {"float": 1e-4, "gptq": 2e-3}
FOLDER = {"float": "source", "gptq": "quantized"}


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.cache
def load(case: str, kind: str, **options) -> QwenForCausalLM:
    return QwenForCausalLM.from_pretrained(GOLDEN / case / FOLDER[kind], dtype="float32", **options)


@functools.cache
def golden(case: str):
    return dict(np.load(GOLDEN / case / "golden.npz"))


def decode_logits(model, ids, tokens):
    _, cache = model.prefill(ids)
    steps = []
    for step in range(tokens.shape[1]):
        logits, cache = model.decode(tokens[:, step : step + 1], cache)
        steps.append(np.asarray(logits)[:, 0])
    return np.stack(steps, 1)


def test_every_case_is_there():
    assert len(CASES) == 6


def rare(case: str) -> list:
    """Marks: slow, but for one case of each family."""
    family = case.split("-")[0]
    first = next(other for other in reversed(CASES) if other.startswith(family))
    return [] if case == first else [pytest.mark.slow]


# Every packed model, and of the float ones, whose files are alike, one of each family.
@pytest.mark.parametrize(
    "case, kind",
    [pytest.param(case, kind, marks=rare(case) if kind == "float" else []) for kind in FOLDER for case in CASES],
)
def test_logits_and_greedy_tokens(case, kind):
    want, model = golden(case), load(case, kind)
    ids = want["ids"]
    assert relative_error(model(ids), want[f"{kind}_prefill"]) < LIMIT[kind]
    last, _ = model.prefill(ids)
    assert relative_error(last, want[f"{kind}_prefill"][:, -1:]) < LIMIT[kind]
    assert relative_error(decode_logits(model, ids, want[f"{kind}_greedy"]), want[f"{kind}_decode"]) < LIMIT[kind]
    assert relative_error(model(want["long_ids"]), want[f"{kind}_long"]) < LIMIT[kind]
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=[])
    np.testing.assert_array_equal(tokens[:, -8:], want[f"{kind}_greedy"])
    # The comparison can fail: the quantized model is not the float one.
    other = "float" if kind == "gptq" else "gptq"
    assert relative_error(model(ids), want[f"{other}_prefill"]) > 5 * LIMIT[kind]


@pytest.mark.parametrize("case", CASES)
def test_decode_equals_prefill(case):
    """Logits of each step are those of scoring the whole sequence at once, also beyond v1's trained length."""
    model, ids = load(case, "gptq"), golden(case)["ids"]
    tokens = golden(case)["gptq_greedy"]
    whole = np.asarray(model(np.concatenate([ids, tokens], axis=1)))[:, ids.shape[1] :]
    assert relative_error(decode_logits(model, ids, tokens), whole) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("qwen1")])
def test_8_bit_cache_is_closer_than_upstreams(case):
    want, model = golden(case), load(case, "float", use_cache_quantization=True)
    ours = relative_error(decode_logits(model, want["ids"], want["float_greedy"]), want["float_decode"])
    upstream = relative_error(want["kv8_decode"], want["float_decode"])
    assert 0 < ours < upstream


# An 8-bit cache knows nothing of how weights are packed: one of each family.
@pytest.mark.parametrize(
    "case, side, quantized_cache",
    [
        pytest.param(case, side, quantized_cache, marks=rare(case) if quantized_cache else [])
        for case in CASES
        for side, quantized_cache in (("left", False), ("left", True), ("right", False))
    ],
)
def test_padding_changes_nothing(case, side, quantized_cache):
    model, ids = load(case, "gptq", use_cache_quantization=quantized_cache), golden(case)["ids"]
    T = ids.shape[1]
    padded, mask = np.full_like(ids, 7), np.zeros_like(ids)
    for row, length in enumerate([T, T - 7]):
        place = slice(T - length, T) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    both = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=[])
    scores = np.asarray(model(padded, attention_mask=mask))
    for row, length in enumerate([T, T - 7]):
        alone = ids[[row, row], :length]  # twice: the programs are those of the two rows together
        expected = model.generate(alone, max_new_tokens=6, do_sample=False, eos_token_id=[])
        np.testing.assert_array_equal(both[row, -6:], expected[0, -6:])
        assert relative_error(scores[row][mask[row] == 1], model(alone)[0]) < 1e-5

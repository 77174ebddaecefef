"""The comparison table against NumPy float64 on the golden models."""

import functools
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import QwenForCausalLM
from qwen_jax.evaluate import compare as compare_module
from qwen_jax.evaluate.compare import Totals, compare

CASE = Path(__file__).parents[2] / "golden" / "qwen2-int4-per-channel"
IDS = np.random.default_rng(0).integers(0, 350, 64)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_totals():
    rng = np.random.default_rng(0)
    reference_TV, logits_TV, ids_T = rng.normal(size=(9, 20)), rng.normal(size=(9, 20)), rng.integers(0, 20, 9)
    totals = Totals()
    totals.add(reference_TV[:4], logits_TV[:4], ids_T[:4])
    totals.add(reference_TV[4:], logits_TV[4:], ids_T[4:])
    got = totals.result("x", "float", 1)
    log_p, log_q = log_softmax(reference_TV), log_softmax(logits_TV)
    assert got.perplexity == pytest.approx(np.exp(-log_q[np.arange(9), ids_T].mean()), rel=1e-5)
    assert got.kl_divergence == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-5)
    assert got.top1_agreement == pytest.approx((reference_TV.argmax(-1) == logits_TV.argmax(-1)).mean())
    with pytest.raises(ValueError, match="not finite"):
        totals.add(reference_TV, logits_TV * np.inf, ids_T)


@functools.cache
def table():
    return compare(CASE / "source", [CASE / "quantized"], IDS, window=32, dtype="float32", use=True)


def test_table():
    rows = table()
    assert [(Path(row.model).name, row.kv_cache) for row in rows] == [
        ("source", "float"),
        ("source", "8-bit"),
        ("quantized", "float"),
        ("quantized", "8-bit"),
    ]
    exact, exact8, int4, int4_8 = rows
    assert all(row.tokens_per_second > 1 and row.peak_bytes is not None for row in rows)
    assert exact.tokens == int4_8.tokens == 31 + 31
    assert exact.kl_divergence < 1e-6 and exact.top1_agreement == 1
    assert 1e-7 < exact8.kl_divergence < 0.1 * int4.kl_divergence
    assert int4.top1_agreement < 1 and int4.weight_bytes < exact.weight_bytes
    # The 8-bit cache changes little beside the 4-bit weights, and something.
    assert 0 < abs(int4_8.kl_divergence - int4.kl_divergence) < 0.1 * int4.kl_divergence


def test_line_by_hand():
    models = [QwenForCausalLM.from_pretrained(CASE / name, dtype="float32") for name in ("source", "quantized")]
    divergence, loss = [], []
    for start in (0, 32):
        ids = IDS[start : start + 32]
        log_p, log_q = (log_softmax(model(ids[None])[0])[:-1] for model in models)
        divergence += list((np.exp(log_p) * (log_p - log_q)).sum(-1))
        loss += list(-log_q[np.arange(len(ids) - 1), ids[1:]])
    row = table()[2]
    assert row.kl_divergence == pytest.approx(np.mean(divergence), rel=1e-3)
    assert row.perplexity == pytest.approx(np.exp(np.mean(loss)), rel=1e-4)


def test_cached_windows_come_in_their_own_order(monkeypatch):
    monkeypatch.setattr(compare_module, "ROWS", 2)
    model = QwenForCausalLM.from_pretrained(CASE / "source", dtype="float32", max_length=64)
    parts = compare_module.windows(len(IDS), 16)
    for part, logits_TV in compare_module._cached(model, IDS, parts):
        want_TV = np.asarray(model(IDS[None, part.start : part.stop])[0, :-1])
        np.testing.assert_allclose(logits_TV, want_TV, atol=1e-3)


def test_bad_kind():
    with pytest.raises(ValueError, match="kv_cache"):
        compare(CASE / "source", [], IDS, kv_cache=("4-bit",))

"""Perplexity against a NumPy float64 calculation on random logits, and the windows it counts."""

import numpy as np
import pytest

from qwen_jax.evaluate.perplexity import Window, perplexity, windows

VOCABULARY = 11


class Table:
    """A model whose logits depend on the token and on how much context it was given, so that a wrong cut shows."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.token_VV = rng.normal(size=(VOCABULARY, VOCABULARY))
        self.position_TV = rng.normal(size=(64, VOCABULARY))

    def __call__(self, ids_BT):
        return self.token_VV[ids_BT] + self.position_TV[: ids_BT.shape[1]]

    def prefill(self, ids_BT):
        return self(ids_BT)[:, -1:], ids_BT.shape[1]

    def decode(self, ids_B1, cache):
        return self.token_VV[ids_B1] + self.position_TV[cache], cache + 1


def expected(model, ids, cuts):
    """The same in float64, from (start, stop, first counted) written out by hand."""
    losses = []
    for start, stop, first in cuts:
        logits_TV = model(ids[None, start:stop])[0]
        for token in range(first, stop):
            row_V = logits_TV[token - 1 - start]
            losses.append(np.log(np.exp(row_V).sum()) - row_V[ids[token]])
    return np.exp(np.mean(losses))


IDS = np.random.default_rng(1).integers(0, VOCABULARY, 25)
CUTS = {
    (10, None, None): [(0, 10, 1), (10, 20, 11), (20, 25, 21)],
    (10, 4, None): [(0, 10, 1), (4, 14, 10), (8, 18, 14), (12, 22, 18), (16, 25, 22)],
    (10, None, 20): [(0, 10, 1), (10, 20, 11)],
    (10, None, 21): [(0, 10, 1), (10, 20, 11)],  # a window of one token predicts nothing
    (64, None, None): [(0, 25, 1)],
}


@pytest.mark.parametrize("arguments", CUTS, ids=str)
def test_perplexity(arguments):
    window, stride, limit = arguments
    model = Table()
    assert windows(len(IDS[:limit]), window, stride) == [Window(*cut) for cut in CUTS[arguments]]
    want = expected(model, IDS, CUTS[arguments])
    assert perplexity(model, IDS, window, stride, limit) == pytest.approx(want, rel=1e-6)
    assert perplexity(model, np.roll(IDS, 1), window, stride, limit) != pytest.approx(want, rel=1e-3)


def test_through_cache_is_the_same():
    model = Table()
    assert perplexity(model, IDS, 10, through_cache=True) == pytest.approx(perplexity(model, IDS, 10), rel=1e-6)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (IDS, {"window": 1}, "window=1"),
        (IDS, {"window": 8, "stride": 9}, "stride=9"),
        (IDS, {"window": 8, "stride": 4, "through_cache": True}, "stride=4"),
        (IDS[:1], {}, "ids: 1 tokens"),
    ],
)
def test_bad_arguments(ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Table(), ids, **arguments)


def test_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        perplexity(lambda ids: np.full((*ids.shape, VOCABULARY), np.nan), IDS)

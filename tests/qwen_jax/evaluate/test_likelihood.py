"""Log-likelihoods of continuations against NumPy float64, batch by batch and window by window."""

from pathlib import Path

import numpy as np
import pytest

from qwen_jax import QwenForCausalLM
from qwen_jax.evaluate.likelihood import Pair, continuation_logprobs, greedy_answers, rolling_pairs, split_pair

CASE = Path(__file__).parents[2] / "golden" / "qwen2-int4-per-channel" / "quantized"
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    return QwenForCausalLM.from_pretrained(CASE, dtype="float32", max_length=32)


def by_hand(model, context, continuation):
    ids = [*context, *continuation][-33:]
    logits_TV = np.asarray(model(np.array([ids[:-1]]))[0], np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    rows = range(len(ids) - 1 - len(continuation), len(ids) - 1)
    total = sum(log_p_TV[row, ids[row + 1]] for row in rows)
    return total, all(log_p_TV[row].argmax() == ids[row + 1] for row in rows)


def test_continuations(model):
    pairs = [
        Pair(rng.integers(0, 350, a).tolist(), rng.integers(0, 350, b).tolist()) for a, b in ((5, 2), (1, 1), (40, 3))
    ]
    start = rng.integers(0, 350, 6)
    best = model.generate(start[None], max_new_tokens=3, do_sample=False, eos_token_id=[])[0, 6:].tolist()
    pairs.append(Pair(start.tolist(), best))
    for batch_size in (None, 1, 3):
        got = continuation_logprobs(model, pairs, 32, batch_size)
        for (logprob, greedy), pair in zip(got, pairs, strict=True):
            want = by_hand(model, pair.context, pair.continuation)
            assert logprob == pytest.approx(want[0], rel=1e-4)
            assert greedy == want[1]
    assert [greedy for _, greedy in got] == [False, False, False, True]
    for bad in (0, 33):
        with pytest.raises(ValueError, match=f"has {bad} tokens, expected 1 to 32"):
            continuation_logprobs(model, [Pair([1], [2] * bad)], 32)


def test_rolling_windows_predict_each_token_once():
    ids = list(range(100, 110))
    pairs = rolling_pairs(ids, 7, 4)
    assert [(list(pair.context), list(pair.continuation)) for pair in pairs] == [
        ([7], [100, 101, 102, 103]),
        ([103], [104, 105, 106, 107]),
        ([105, 106, 107], [108, 109]),
    ]
    assert rolling_pairs([], 7, 4) == []


class Words:
    """One id a word of the vocabulary below; a space before a word is part of it."""

    words = ["a", " b", " c", "<s>"]
    stop_token_ids = (3,)

    def encode(self, text, control_tokens=False):
        found, rest = [], text
        while rest:
            word = next(word for word in self.words if rest.startswith(word))
            found.append(self.words.index(word))
            rest = rest[len(word) :]
        return found

    def token_bytes(self, token):
        return self.words[token % 4].encode()

    def decode(self, ids):
        return "".join(self.words[token % 4] for token in ids)


def test_pairs_are_cut_in_the_joint_text():
    assert split_pair(Words(), "a b ", "c", 9) == Pair([0, 1], [2])
    assert split_pair(Words(), "", "a b", 9) == Pair([9], [0, 1])


def test_answers_stop_before_the_stop_text(model):
    prompts = [rng.integers(0, 350, length).tolist() for length in (4, 7, 5)]
    tokens = [
        model.generate(np.array([p]), max_new_tokens=6, do_sample=False, eos_token_id=[3])[0, len(p) :] for p in prompts
    ]
    whole = [Words().decode(each) for each in tokens]
    got = greedy_answers(model, Words(), prompts, [], 6, batch_size=2)
    assert got == whole
    stop = whole[0][2:4]
    got = greedy_answers(model, Words(), prompts, [stop], 6, batch_size=2)
    assert got == [each.split(stop)[0] for each in whole] != whole

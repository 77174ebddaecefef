"""Perplexity of a text in windows, through prefill or, token by token, through the KV cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WINDOWS_A_BATCH = 8  # of the cache path, where a step costs nearly the same for one row and for eight


class Window(NamedTuple):
    """Tokens [start, stop) go through the model; the predictions of tokens [first, stop) count."""

    start: int
    stop: int
    first: int


def windows(length: int, window: int, stride: int | None = None) -> list[Window]:
    """Cuts `length` tokens: windows begin every `stride` tokens, each token is predicted at most once.

    With stride None (= window) windows do not overlap, and a window's first token, which has no context, is not
    counted. With a smaller stride every window after the first counts only the tokens that are new in it.

    Raises:
        ValueError: for a window below 2 tokens, a stride outside 1 … window, or a text of fewer than 2 tokens.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise ValueError(f"window={window}: expected at least 2 tokens, one to predict and one before it.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride}: expected 1 to window ({window}).")
    if length < 2:
        raise ValueError(f"ids: {length} tokens, expected at least 2. Give a longer text.")
    found, done = [], 0
    for start in range(0, length, stride):
        stop = min(start + window, length)
        first = max(start + 1, done)
        if first < stop:
            found.append(Window(start, stop, first))
            done = stop
        if stop == length:
            break
    return found


def perplexity(
    model,
    ids,
    window: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    through_cache: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """exp of the mean negative log-likelihood of the counted tokens; sums in float64 of float32 logits.

    Args:
        model: a `QwenForCausalLM`, or anything that gives float logits [1, T, V] for ids [1, T].
        ids: the text's token ids, one sequence.
        window: tokens that go through the model at once.
        stride: tokens between the beginnings of windows; None for windows that do not overlap.
        limit: only the first so many tokens; None for all.
        through_cache: predict each token by a decode step, from the KV cache as the model keeps it (8 bits if it was
            loaded so); windows must not overlap then. Far slower than prefill, in which the cache plays no part.
        progress: called with the tokens counted so far and their number.

    Raises:
        ValueError: see `windows`; also for logits that are not finite.

    >>> uniform = lambda ids: np.zeros((*ids.shape, 50))
    >>> round(perplexity(uniform, np.arange(20), window=10), 3)
    50.0
    """
    ids = np.asarray(ids, np.int32).reshape(-1)[:limit]
    if through_cache:
        if stride not in (None, window):
            raise ValueError(f"stride={stride}: with through_cache windows do not overlap; leave it out.")
        parts = windows(len(ids), window)
        scores = _through_cache(model, ids, parts)
    else:
        parts = windows(len(ids), window, stride)
        scores = (token_logprobs(model(ids[None, w.start : w.stop]), ids, w) for w in parts)
    counted = sum(part.stop - part.first for part in parts)
    total, count = 0.0, 0
    for logprobs in scores:
        if not np.isfinite(logprobs).all():
            raise ValueError("The model's logits are not finite; load it with dtype bfloat16 or float32.")
        total += float(logprobs.sum(dtype=np.float64))
        count += len(logprobs)
        progress(count, counted)
    return math.exp(-total / count)


def token_logprobs(logits_1TV, ids: Sequence[int] | np.ndarray, window: Window) -> np.ndarray:
    """Natural logarithms of the probabilities of a window's counted tokens, float32 [stop − first]."""
    before = slice(window.first - 1 - window.start, window.stop - 1 - window.start)
    targets = jnp.asarray(np.asarray(ids)[window.first : window.stop])
    return np.asarray(_logprobs(jnp.asarray(logits_1TV)[0, before], targets))


@jax.jit
def _logprobs(logits_TV, ids_T):
    logits_TV = logits_TV.astype(jnp.float32)
    chosen_T = jnp.take_along_axis(logits_TV, ids_T[:, None], axis=-1)[:, 0]
    return chosen_T - jax.nn.logsumexp(logits_TV, axis=-1)


def _through_cache(model, ids: np.ndarray, parts: list[Window]) -> Iterator[np.ndarray]:
    """Windows of equal length side by side as rows of a batch: one prefilled token, then decode steps."""
    for length in sorted({part.stop - part.start for part in parts}, reverse=True):
        alike = [part for part in parts if part.stop - part.start == length]
        for begin in range(0, len(alike), WINDOWS_A_BATCH):
            rows_BT = np.stack([ids[part.start : part.stop] for part in alike[begin : begin + WINDOWS_A_BATCH]])
            logits_B1V, cache = model.prefill(rows_BT[:, :1])
            for position in range(1, length):
                yield np.asarray(_logprobs(logits_B1V[:, 0], jnp.asarray(rows_BT[:, position])))
                if position < length - 1:
                    logits_B1V, cache = model.decode(rows_BT[:, position : position + 1], cache)

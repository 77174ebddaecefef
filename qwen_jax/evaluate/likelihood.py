"""Log-likelihoods of continuations and greedy answers for many texts at once, as evaluation tasks ask for them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.text_stream import TextStream

LOGITS_BYTES = 1 << 30  # of one batch's float32 logits


@dataclasses.dataclass(frozen=True)
class Pair:
    """Token ids of a context and of the continuation whose probability is asked."""

    context: Sequence[int]
    continuation: Sequence[int]


def split_pair(tokenizer, context: str, continuation: str, prefix: int, control_tokens: bool = False) -> Pair:
    """Ids of a context and its continuation, cut where the joint text is.

    Spaces at the end of the context belong to the continuation's first token, as in lm-eval's own models. An empty
    context is the one token `prefix`.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    if not context:
        return Pair([prefix], tokenizer.encode(continuation, control_tokens=control_tokens))
    before = tokenizer.encode(context, control_tokens=control_tokens)
    whole = tokenizer.encode(context + continuation, control_tokens=control_tokens)
    return Pair(before, whole[len(before) :])


def continuation_logprobs(
    model, pairs: Sequence[Pair], max_length: int, batch_size: int | None = None
) -> list[tuple[float, bool]]:
    """For each pair the log-probability of the continuation, and whether greedy decoding would give it.

    Pairs longer than `max_length` + 1 tokens lose the beginning of their context.

    Args:
        model: a `QwenForCausalLM`.
        pairs: continuations of at least one token.
        max_length: tokens that the model takes.
        batch_size: rows at once; None for as many as a GB of logits allows.

    Raises:
        ValueError: an empty continuation, or one longer than the model allows.
    """
    for pair in pairs:
        if not 1 <= len(pair.continuation) <= max_length:
            raise ValueError(
                f"A continuation has {len(pair.continuation)} tokens, expected 1 to {max_length}, the model's longest."
            )
    rows = [([*pair.context, *pair.continuation])[-max_length - 1 :] for pair in pairs]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    results: dict[int, tuple[float, bool]] = {}
    while order:
        longest = len(rows[order[0]]) - 1
        fits = max(LOGITS_BYTES // (4 * model.config.vocab_size * max(longest, 1)), 1)
        batch, order = order[: batch_size or fits], order[batch_size or fits :]
        ids_BT = np.zeros((len(batch), longest), np.int32)
        targets_BT, counted_BT, mask_BT = np.zeros_like(ids_BT), np.zeros(ids_BT.shape, bool), np.zeros_like(ids_BT)
        for place, index in enumerate(batch):
            row, count = rows[index], len(pairs[index].continuation)
            length = len(row) - 1
            ids_BT[place, :length], targets_BT[place, :length] = row[:-1], row[1:]
            mask_BT[place, :length] = 1
            counted_BT[place, length - count : length] = True
        logprob_B, greedy_B = _score(model(ids_BT, mask_BT), targets_BT, counted_BT)
        for index, logprob, greedy in zip(batch, np.asarray(logprob_B), np.asarray(greedy_B), strict=True):
            if not np.isfinite(logprob):
                raise ValueError("The model's logits are not finite; load it with dtype bfloat16 or float32.")
            results[index] = float(logprob), bool(greedy)
    return [results[index] for index in range(len(rows))]


@jax.jit
def _score(logits_BTV, targets_BT, counted_BT):
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    logprob_BT = chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    agrees_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return jnp.where(counted_BT, logprob_BT, 0.0).sum(-1), (agrees_BT | ~counted_BT).all(-1)


def rolling_pairs(ids: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
    """Cuts a text so that each token is predicted once, the last window with as much context as the model takes."""
    pairs, start = [], 0
    whole = [prefix, *ids]
    while start < len(ids):
        stop = min(start + max_length, len(ids))
        first = max(stop - max_length, 0)
        pairs.append(Pair(whole[first : start + 1], whole[start + 1 : stop + 1]))
        start = stop
    return pairs


def greedy_answers(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    until: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    **options,
) -> list[str]:
    """An answer to each prompt, without the stop text that ended it; `options` as in `generate`, greedy by default."""
    order, answers = sorted(range(len(prompts)), key=lambda index: -len(prompts[index])), {}
    options = {"do_sample": False} | options
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        longest = max(len(prompts[index]) for index in batch)
        ids_BT, mask_BT = np.zeros((len(batch), longest), np.int32), np.zeros((len(batch), longest), np.int32)
        for place, index in enumerate(batch):
            ids_BT[place, : len(prompts[index])], mask_BT[place, : len(prompts[index])] = prompts[index], 1
        # Texts are cut here, not by `generate`, which keeps the whole token that a stop text begins in.
        texts = [TextStream(tokenizer, until, tokenizer.stop_token_ids) for _ in batch]
        for chunk in model.stream(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(tokenizer.stop_token_ids),
            **options,
        ):
            for place, text in enumerate(texts):
                if not text.finished:
                    text.push(chunk.tokens_BN[place][chunk.kept_BN[place]].tolist())
            if all(text.finished or chunk.done_B[place] for place, text in enumerate(texts)):
                break
        answers |= {index: text.finish() for index, text in zip(batch, texts, strict=True)}
    return [answers[index] for index in range(len(prompts))]

"""Prefill, and a decode loop that stays on the device for a chunk of tokens at a time."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import decode_step
from pallas_kernels.block_sums import compiler_options
from pallas_kernels.chip import default_chip
from qwen_jax import fused_decode, split_cache
from qwen_jax.errors import NonFiniteLogitsError
from qwen_jax.kv_cache import CacheState
from qwen_jax.model import Decoder, Step
from qwen_jax.rotary import attention_factor, dynamic_ntk_alpha, inverse_frequency, logn, rotary
from qwen_jax.sampling import WHOLE, Filters, Sampler, SamplingConfig, Vocabulary, device_sampler, sample

CHUNK = 8  # tokens a dispatch: a host round trip is spread over them, and a stream still moves several times a second


def bucket(length: int, smallest: int = 16) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, …: few programs to compile, at most half of each padding."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class Loop(NamedTuple):
    """What the decode loop carries from token to token, all on the device.

    Attributes:
        cache: the cache, donated from chunk to chunk.
        token_B: int32, the newest token of each row, not yet in the cache.
        done_B: bool, rows that met a stop token: they keep still and emit the padding token.
        count_B: int32, tokens produced by each row.
        seen_BV: bool, tokens a repetition penalty acts on; None without one.
        nonfinite_B: int32, the step whose logits were not finite; −1 for none.
    """

    cache: CacheState
    token_B: Any
    done_B: Any
    count_B: Any
    seen_BV: Any
    nonfinite_B: Any


class Rules(NamedTuple):
    """What ends a row: `stop_N` int32 token ids (−1 pads the list), `pad` int32 the token of a finished row."""

    stop_N: Any
    pad: Any


class Emitted(NamedTuple):
    """What the host gets of a chunk: `Chunk` on the device, and the loop's `nonfinite_B`."""

    tokens_BN: Any
    logprobs_BN: Any
    kept_BN: Any
    done_B: Any
    nonfinite_B: Any


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of every row.

    Attributes:
        tokens_BN: int32 [B, N], a finished row holding the padding token after its stop token.
        logprobs_BN: float32 [B, N], natural logarithm of each token's probability before temperature and filters;
            None unless asked for.
        kept_BN: bool [B, N], False for the padding of finished rows.
        done_B: bool [B], rows that are finished.
    """

    tokens_BN: np.ndarray
    logprobs_BN: np.ndarray | None
    kept_BN: np.ndarray
    done_B: np.ndarray


class Programs:
    """The compiled functions of one model; the model's arrays are flattened once and passed as one flat list."""

    def __init__(self, model: Decoder):
        self.config = model.config
        self.vocabulary_width = model.config.vocab_size  # columns of logits; over devices possibly more
        self._leaves, structure = jax.tree.flatten(model)
        # The structure is a static argument, not a closure: models that are alike share what was compiled.
        jitted = _jitted(default_chip())
        self._score = functools.partial(jitted.score, structure)
        self._prefill = functools.partial(jitted.prefill, structure)
        self._decode = functools.partial(jitted.decode, structure)
        self._first = jitted.first
        self._chunk = functools.partial(jitted.chunk, structure)

    def empty_cache(self, slots: int, length: int, dtype: str, quantized: bool) -> CacheState:
        """Room for `length` tokens in each of `slots` rows."""
        return CacheState.empty(self.config, slots, length, dtype, quantized)

    def score(self, ids_BT, lengths_B):
        """float32 logits [B, T, V] of right-padded rows; a padded position's are arbitrary."""
        return self._score(self._leaves, ids_BT, lengths_B)

    def prefill(self, ids_BT, lengths_B, cache: CacheState):
        """Fills an empty cache; float32 logits [B, V] of each row's last token, and the cache."""
        return self._read(ids_BT, lengths_B, cache)

    def decode(self, token_B, cache: CacheState, active_length: int):
        """One more token a row; float32 logits [B, V] and the cache."""
        return self._decode(self._leaves, token_B, cache=cache, active_length=active_length)

    def stream(
        self,
        ids_BT: np.ndarray,
        lengths_B: np.ndarray,
        cache: CacheState,
        sampling: SamplingConfig,
        seed_B: np.ndarray,
        stop_ids: tuple[int, ...],
        pad_id: int,
        max_new_tokens: int,
        logprobs: bool = False,
        chunk: int = CHUNK,
    ) -> Iterator[Chunk]:
        """Generates: the first token alone, as soon as the prompt is read, then `chunk` tokens a time.

        Raises:
            NonFiniteLogitsError: with the row and the step.
        """
        sampler, filters = device_sampler(sampling, seed_B)
        rules = Rules(np.asarray(stop_ids or (-1,), np.int32), np.int32(pad_id))
        seen_BV = None
        if filters.repetition_penalty:
            seen_BV = np.zeros((ids_BT.shape[0], self.vocabulary_width), bool)
            for row, length in enumerate(lengths_B):
                seen_BV[row, ids_BT[row, :length]] = True
        room = cache.kv.keys.shape[3]
        sampler, seen_BV = self._place(sampler, seen_BV)
        logits_BV, cache = self._read(ids_BT, lengths_B, cache)
        loop, out = self._first(logits_BV, seen_BV, sampler, rules, cache=cache, filters=filters, logprobs=logprobs)
        longest, produced = int(max(lengths_B)), 1

        def dispatch(loop, produced):
            loop, out = self._chunk(
                self._leaves,
                sampler,
                rules,
                loop=loop,
                filters=filters,
                logprobs=logprobs,
                steps=chunk,
                active_length=min(bucket(longest + produced + chunk, 128), room),
            )
            if produced + chunk > max_new_tokens:  # the loop has one compiled length: surplus tokens are cut here
                parts = jax.tree.map(lambda array: array[:, : max_new_tokens - produced], out[:3])
                out = Emitted(*parts, *out[3:])
            return loop, out, produced + chunk

        ahead = False  # the first token waits for no compiler
        while True:
            following = None
            if ahead and produced < max_new_tokens:
                loop, following, produced = dispatch(loop, produced)
            yield (result := _to_host(out))
            if result.done_B.all():
                return
            if following is None:
                if produced >= max_new_tokens:
                    return
                loop, following, produced = dispatch(loop, produced)
            out = following
            # An accelerator gets the next chunk before the last one's tokens are read, and never waits for the host (60
            # µs a token); an answer's last chunk may be for nothing. A CPU computes where the host does.
            ahead = default_chip() != "cpu"

    def _read(self, ids_BT, lengths_B, cache: CacheState):
        """Logits of each row's last token as `_first` takes them, and the cache."""
        return self._prefill(self._leaves, ids_BT, lengths_B, cache=cache)

    def _place(self, sampler: Sampler, seen_BV):
        """Both where the loop wants them."""
        return sampler, seen_BV


def _to_host(out: Emitted) -> Chunk:
    tokens_BN, logprobs_BN, kept_BN, done_B, nonfinite_B = jax.device_get(out)
    bad = np.flatnonzero(nonfinite_B >= 0)
    if bad.size:
        raise NonFiniteLogitsError(
            f"logits: NaN or infinity at step {nonfinite_B[bad[0]]} of row {bad[0]}; expected finite numbers. Load the "
            'model with dtype="bfloat16" (float16 overflows above 65504), or check the checkpoint.'
        )
    return Chunk(tokens_BN, logprobs_BN, kept_BN, done_B)


def _model(structure, leaves) -> Decoder:
    return jax.tree.unflatten(structure, leaves)


def _prompt_step(model: Decoder, ids_BT, lengths_B) -> tuple[Step, Any]:
    config = model.config
    alpha_B = dynamic_ntk_alpha(lengths_B, config.seq_length) if config.use_dynamic_ntk else None
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    start_B = jnp.zeros_like(lengths_B)
    return Step(rotary(config, positions_BT, alpha_B), start_B, lengths_B), alpha_B


def _score(structure, leaves, ids_BT, lengths_B):
    model = _model(structure, leaves)
    step, _ = _prompt_step(model, ids_BT, lengths_B)
    hidden_BTD, _ = model.hidden(ids_BT, step, None)
    return model.logits(hidden_BTD)


def _prefill(structure, leaves, ids_BT, lengths_B, *, cache: CacheState):
    model = _model(structure, leaves)
    step, alpha_B = _prompt_step(model, ids_BT, lengths_B)
    hidden_BTD, kv = model.hidden(ids_BT, step, cache.kv)
    assert kv is not None
    last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last_BD), CacheState(kv, lengths_B, alpha_B)


class _Tables(NamedTuple):
    """What the steps of a dispatch share, over all positions of the cache; see `Step`."""

    key_rotary: Any
    one_launch: Any

    @classmethod
    def of(cls, model: Decoder, cache: CacheState) -> "_Tables":
        # An 8-bit cache needs the tables to add key biases, the one launch to turn the new token.
        biased = cache.kv.quantized and any(block.attention.key_bias is not None for block in model.blocks)
        in_one = fused_decode.wanted(model, cache.lengths_B.shape[0])
        if not biased and not in_one:
            return cls(None, None)
        positions_S = split_cache.positions(model.cache_axis, cache.kv.keys.shape[3])
        frequency_BK = inverse_frequency(model.config, cache.ntk_alpha_B)
        angle_BSK = positions_S.astype(jnp.float32)[None, :, None] * frequency_BK[:, None, :]
        factor = attention_factor(model.config)
        cos_sin = jnp.cos(angle_BSK) * factor, jnp.sin(angle_BSK) * factor
        one_launch = decode_step.Tables.of(*cos_sin, logn(model.config, positions_S)) if in_one else None
        return cls(cos_sin if biased else None, one_launch)


def _step(model: Decoder, token_B, cache: CacheState, tables: _Tables, active_length: int):
    step = Step(
        rotary(model.config, cache.lengths_B[:, None], cache.ntk_alpha_B),
        start_B=cache.lengths_B,
        lengths_B=cache.lengths_B + 1,
        key_rotary=tables.key_rotary,
        decode=True,
        active_length=active_length,
        one_launch=tables.one_launch,
    )
    hidden_BTD, kv = model.hidden(token_B[:, None], step, cache.kv)
    assert kv is not None
    return model.logits(hidden_BTD[:, 0]), CacheState(kv, step.lengths_B, cache.ntk_alpha_B)


def _decode(structure, leaves, token_B, *, cache: CacheState, active_length: int):
    model = _model(structure, leaves)
    return _step(model, token_B, cache, _Tables.of(model, cache), active_length)


def _choose(
    logits_BV, loop: Loop, sampler: Sampler, rules: Rules, filters: Filters, logprobs: bool, vocabulary: Vocabulary
):
    """Samples, notes stops and non-finite logits; returns the loop with its new token and what the host gets."""
    token_B, finite_B = sample(logits_BV, loop.seen_BV, loop.count_B, sampler, filters, vocabulary)
    token_B = jnp.where(loop.done_B, rules.pad, token_B)
    kept_B = ~loop.done_B
    logprob_B = None
    if logprobs:
        highest_B = vocabulary.max(logits_BV)
        sum_B = vocabulary.sum(jnp.exp(logits_BV - highest_B[:, None]))
        logprob_B = vocabulary.at(logits_BV, token_B) - highest_B - jnp.log(sum_B)
    bad_B = kept_B & (loop.nonfinite_B < 0) & ~finite_B
    seen_BV = loop.seen_BV
    if seen_BV is not None:
        seen_BV = vocabulary.mark(seen_BV, token_B)
    return Loop(
        loop.cache,
        token_B,
        # Written out: a reduction over a handful of stop tokens would be a launch of its own.
        functools.reduce(jnp.logical_or, [token_B == stop for stop in rules.stop_N], loop.done_B),
        loop.count_B + kept_B.astype(jnp.int32),
        seen_BV,
        jnp.where(bad_B, loop.count_B, loop.nonfinite_B),
    ), (token_B, logprob_B, kept_B)


def _first(logits_BV, seen_BV, sampler, rules, *, cache: CacheState, filters, logprobs, vocabulary=WHOLE):
    """The token after the prompt."""
    B = logits_BV.shape[0]
    zeros_B = jnp.zeros(B, jnp.int32)
    loop = Loop(cache, zeros_B, jnp.zeros(B, bool), zeros_B, seen_BV, zeros_B - 1)
    loop, out = _choose(logits_BV, loop, sampler, rules, filters, logprobs, vocabulary)
    token_B1, logprob_B1, kept_B1 = jax.tree.map(lambda array_B: array_B[:, None], out)
    return loop, Emitted(token_B1, logprob_B1, kept_B1, loop.done_B, loop.nonfinite_B)


def _chunk(
    structure,
    leaves,
    sampler,
    rules,
    *,
    loop: Loop,
    filters,
    logprobs,
    steps: int,
    active_length: int,
    vocabulary: Vocabulary = WHOLE,
):
    """`steps` more tokens."""
    tables = _Tables.of(_model(structure, leaves), loop.cache)

    def body(loop: Loop, _):
        # Without the barrier XLA moves work on the weights (unpacking them all) out of the loop: 538 MB for 135M.
        held, token_B = lax.optimization_barrier((leaves, loop.token_B))
        before = loop.cache
        logits_BV, cache = _step(_model(structure, held), token_B, before, tables, active_length)
        # A finished row stays where it is: its slot's length does not grow, whatever was written there is overwritten.
        lengths_B = jnp.where(loop.done_B, before.lengths_B, cache.lengths_B)
        cache = CacheState(cache.kv, lengths_B, cache.ntk_alpha_B)
        return _choose(logits_BV, loop._replace(cache=cache), sampler, rules, filters, logprobs, vocabulary)

    loop, out = lax.scan(body, loop, length=steps)
    tokens_BN, logprobs_BN, kept_BN = jax.tree.map(lambda array_NB: array_NB.T, out)
    return loop, Emitted(tokens_BN, logprobs_BN, kept_BN, loop.done_B, loop.nonfinite_B)


class _Jitted(NamedTuple):
    score: Any
    prefill: Any
    decode: Any
    first: Any
    chunk: Any


@functools.cache
def _jitted(chip: str) -> _Jitted:
    """The compiled functions for a chip, shared by all models; made with the first model: importing asks no device."""
    jit = functools.partial(jax.jit, compiler_options=compiler_options(chip))
    choices = ("filters", "logprobs")
    return _Jitted(
        score=jit(_score, static_argnums=0),
        prefill=jit(_prefill, static_argnums=0, donate_argnames="cache"),
        decode=jit(_decode, static_argnums=0, static_argnames="active_length", donate_argnames="cache"),
        first=jit(_first, static_argnames=choices, donate_argnames="cache"),
        chunk=jit(
            _chunk, static_argnums=0, static_argnames=(*choices, "steps", "active_length"), donate_argnames="loop"
        ),
    )

"""The compiled functions of a model on a mesh: those of `generation.py` under one `jax.shard_map` each.

Rows of a batch lie on "data", padded with copies of the last where they do not divide evenly; logits stay split over
"model" inside the decode loop and are gathered only for who asks for them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.block_sums import compiler_options
from pallas_kernels.chip import default_chip
from pallas_kernels.kv_attention import KVArrays
from pallas_kernels.tpu import keeps_float16_as_bits
from qwen_jax import distributed, generation
from qwen_jax.generation import Chunk, Loop, Programs
from qwen_jax.kv_cache import CacheState
from qwen_jax.model import Decoder
from qwen_jax.parallel_linear import VocabularyLinear
from qwen_jax.sampling import Sampler, Vocabulary
from qwen_jax.sharding import DATA, KV_AXES, Placement, parameter_axes, spec

ROWS = spec(("batch",))
SAMPLER = Sampler(ROWS, P(), P(), P(), P(), P())


class ShardedPrograms(Programs):
    """`Programs` of a model made from `ShardedWeights`; takes and returns the rows of the user, not the padded ones."""

    def __init__(self, model: Decoder, mesh: Mesh):
        self.placement = Placement(mesh)
        table = model.embedding
        assert isinstance(table, VocabularyLinear)
        self.config = model.config
        self.vocabulary_width = table.weight.out_features
        width = self.vocabulary_width // self.placement.parts
        self._vocabulary = Vocabulary(self.placement.axis("vocabulary"), self.config.vocab_size, width)
        self._leaves, self._structure = jax.tree.flatten(model)
        spec = self.placement.spec
        self._specs = [spec(names) for names in parameter_axes(model)]
        self._logits = spec(("batch", "vocabulary"))
        # Keys, values, scales and minimums start with the same dimensions.
        kv = KVArrays(*[spec(KV_AXES)] * 2, *[spec(KV_AXES[:-1])] * 4)
        self._cache_specs = CacheState(kv, ROWS, ROWS)
        self._loop_specs = Loop(self._cache_specs, ROWS, ROWS, ROWS, self._logits, ROWS)
        self._empties: dict[tuple, Callable[[], CacheState]] = {}
        self.cache_formats = self._formats()
        loop = Loop(self.cache_formats, None, None, None, None, None)
        jit = functools.partial(jax.jit, compiler_options=compiler_options(default_chip()))
        step = functools.partial(jit, donate_argnames="cache", out_shardings=(None, self.cache_formats))
        chunk = functools.partial(jit, out_shardings=(loop, None))
        choices = ("filters", "logprobs")
        self._score = jit(self._run_score)
        self._prefill = step(self._run_prefill)
        self._decode = step(self._run_decode, static_argnames="active_length")
        self._first = chunk(self._run_first, donate_argnames="cache", static_argnames=choices)
        choices += ("steps", "active_length")
        self._chunk = chunk(self._run_chunk, donate_argnames="loop", static_argnames=choices)
        self._whole = jax.jit(self._run_whole, static_argnames="rows")

    def _formats(self) -> CacheState:
        """Where the cache lies and, of its scales on TPUs, the order of dimensions in memory: the kernels'.

        Left to itself XLA keeps a key/value head a chip, or five, with another dimension in its place, because tiles of
        eight rows then stay full, and copies all scales whenever a program begins and ends.
        """

        mesh, kv = self.placement.mesh, self._cache_specs.kv
        data, scales, rows = (NamedSharding(mesh, axes) for axes in (kv.keys, kv.key_scales, ROWS))
        if keeps_float16_as_bits(default_chip()):
            scales = Format(Layout(tuple(range(len(KV_AXES) - 1))), scales)
        return CacheState(KVArrays(data, data, scales, scales, scales, scales), rows, rows)

    # -- for callers: rows are the user's ------------------------------------------------------------------------------

    def empty_cache(self, slots: int, length: int, dtype: str, quantized: bool) -> CacheState:
        """As `Programs.empty_cache`, with slots for padded rows and copies of heads; made in place on each device."""
        slots += -slots % self.placement.data
        key = (slots, self.room(length), dtype, quantized)
        if key not in self._empties:
            whole = {name: getattr(self.config, name) * self.placement.model for name in ("num_heads", "num_kv_heads")}
            make = functools.partial(CacheState.empty, dataclasses.replace(self.config, **whole), *key)
            self._empties[key] = jax.jit(make, out_shardings=self.cache_formats)
        return self._empties[key]()

    def score(self, ids_BT, lengths_B):
        """See `Programs.score`."""
        with distributed.step("scoring"):
            logits = self._score(self._leaves, self._rows(ids_BT), self._rows(lengths_B))
            return self._finished(self._whole(logits, rows=len(lengths_B)))

    def prefill(self, ids_BT, lengths_B, cache: CacheState):
        """See `Programs.prefill`."""
        with distributed.step("reading the prompt"):
            logits, cache = self._read(ids_BT, lengths_B, cache)
            return self._finished(self._whole(logits, rows=len(lengths_B))), cache

    def decode(self, token_B, cache: CacheState, active_length: int):
        """See `Programs.decode`."""
        with distributed.step("decoding"):
            logits, cache = self._decode(self._leaves, self._rows(token_B), cache=cache, active_length=active_length)
            return self._finished(self._whole(logits, rows=len(token_B))), cache

    def stream(self, ids_BT, lengths_B, cache, sampling, seed_B, *arguments, **options):
        """See `Programs.stream`."""
        rows = len(lengths_B)
        ids_BT, lengths_B, seed_B = (self._pad(array) for array in (ids_BT, lengths_B, seed_B))
        chunks = super().stream(ids_BT, lengths_B, cache, sampling, seed_B, *arguments, **options)
        for number in itertools.count():
            with distributed.step(f"decoding, chunk {number}" if number else "reading the prompt"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            parts = {field.name: getattr(chunk, field.name) for field in dataclasses.fields(chunk)}
            kept: dict[str, Any] = {name: None if part is None else part[:rows] for name, part in parts.items()}
            yield Chunk(**kept)

    def room(self, length: int) -> int:
        """A length of the cache of which every device of "sequence" holds as much, in whole tiles of the kernels."""
        if self.placement.sequence == 1:
            return length
        share = -(-length // self.placement.sequence)
        return self.placement.sequence * (share + -share % (128 if share > 64 else 8))

    # -- hooks of `Programs.stream` ------------------------------------------------------------------------------------

    def _read(self, ids_BT, lengths_B, cache: CacheState):
        return self._prefill(self._leaves, self._rows(ids_BT), self._rows(lengths_B), cache=cache)

    def _place(self, sampler: Sampler, seen_BV):
        seen_BV = None if seen_BV is None else self.placement.rows(seen_BV, ("batch", "vocabulary"))
        return sampler._replace(seed_B=self._rows(sampler.seed_B)), seen_BV

    def _finished(self, logits):
        """With several processes a step is over when its result is there: see `distributed.step`."""
        return jax.block_until_ready(logits) if jax.process_count() > 1 else logits

    def _pad(self, array) -> np.ndarray:
        """Rows for every device: the last one repeated."""
        array = np.asarray(array)
        return np.concatenate([array, np.repeat(array[-1:], -len(array) % self.placement.data, axis=0)])

    def _rows(self, array) -> jax.Array:
        array = self._pad(array)
        return self.placement.rows(array, ("batch", "length")[: array.ndim])

    # -- compiled ------------------------------------------------------------------------------------------------------

    def _shard(self, function, in_specs, out_specs):
        # check_vma: kernels written in Pallas cannot say along which mesh axes their result varies.
        return jax.shard_map(
            function, mesh=self.placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _run_score(self, leaves, ids_BT, lengths_B):
        score = functools.partial(generation._score, self._structure)
        logits = self.placement.spec(("batch", "length", "vocabulary"))
        return self._shard(score, (self._specs, ROWS, ROWS), logits)(leaves, ids_BT, lengths_B)

    def _run_prefill(self, leaves, ids_BT, lengths_B, *, cache):
        def local(leaves, ids_BT, lengths_B, cache):
            return generation._prefill(self._structure, leaves, ids_BT, lengths_B, cache=cache)

        in_specs = (self._specs, ROWS, ROWS, self._cache_specs)
        return self._shard(local, in_specs, (self._logits, self._cache_specs))(leaves, ids_BT, lengths_B, cache)

    def _run_decode(self, leaves, token_B, *, cache, active_length):
        def local(leaves, token_B, cache):
            return generation._decode(self._structure, leaves, token_B, cache=cache, active_length=active_length)

        in_specs = (self._specs, ROWS, self._cache_specs)
        return self._shard(local, in_specs, (self._logits, self._cache_specs))(leaves, token_B, cache)

    def _run_first(self, logits_BV, seen_BV, sampler, rules, *, cache, filters, logprobs):
        def local(logits_BV, seen_BV, sampler, rules, cache):
            loop, out = generation._first(
                logits_BV,
                seen_BV,
                sampler,
                rules,
                cache=cache,
                filters=filters,
                logprobs=logprobs,
                vocabulary=self._vocabulary,
            )
            return loop, _all_rows(out)

        in_specs = (self._logits, self._logits, SAMPLER, P(), self._cache_specs)
        shard = self._shard(local, in_specs, (self._loop_specs, P()))
        return shard(logits_BV, seen_BV, sampler, rules, cache)

    def _run_chunk(self, leaves, sampler, rules, *, loop, filters, logprobs, steps, active_length):
        def local(leaves, sampler, rules, loop):
            loop, out = generation._chunk(
                self._structure,
                leaves,
                sampler,
                rules,
                loop=loop,
                filters=filters,
                logprobs=logprobs,
                steps=steps,
                active_length=active_length,
                vocabulary=self._vocabulary,
            )
            return loop, _all_rows(out)

        in_specs = (self._specs, SAMPLER, P(), self._loop_specs)
        return self._shard(local, in_specs, (self._loop_specs, P()))(leaves, sampler, rules, loop)

    def _run_whole(self, logits, *, rows):
        """Split logits to the user's: every row and token on every device, so that each process can read them."""

        def local(logits):
            return _all_rows(lax.all_gather(logits, self._vocabulary.axis, axis=logits.ndim - 1, tiled=True))

        middle = ("length",) * (logits.ndim - 2)
        whole = self._shard(local, self.placement.spec(("batch", *middle, "vocabulary")), P())(logits)
        return whole[:rows, ..., : self.config.vocab_size]


def _all_rows(tree):
    return jax.tree.map(lambda array: lax.all_gather(array, DATA, axis=0, tiled=True), tree)

"""Speed of decoding: whole steps of a model of true dimensions, from a cache that already holds `context` tokens."""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.bench.models import MODELS
from qwen_jax.bench.random_weights import RandomWeights
from qwen_jax.generation import Loop, Programs, Rules, bucket
from qwen_jax.kv_cache import CacheState, bytes_per_token
from qwen_jax.model import Decoder
from qwen_jax.sampling import SamplingConfig, device_sampler


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """One measurement.

    Attributes:
        tokens_per_second: of all rows together, median of the rounds.
        step_ms: milliseconds a step, median; fastest and slowest round beside it.
        bytes_per_step: weights, scales, head and cache that a step must read.
        gigabytes_per_second: bytes_per_step over the median step.
        peak_bytes: the device's own count, None where it has none.
    """

    model: str
    bits: int
    kv_bits: int
    batch: int
    context: int
    tokens_per_second: float
    step_ms: float
    step_ms_fastest: float
    step_ms_slowest: float
    bytes_per_step: int
    gigabytes_per_second: float
    peak_bytes: int | None


def build(name: str, *, bits: int, dtype: str, kernels: str = "auto", layers: int | None = None) -> Decoder:
    """A model of the named dimensions with random weights; `layers` shortens it."""
    config = MODELS[name]
    if layers is not None:
        config = dataclasses.replace(config, num_layers=layers, sliding_layers=(False,) * layers)
    weights = RandomWeights(config, bits=bits, dtype=dtype, kernels=kernels)
    return Decoder(config, weights, dtype=dtype, kernels=kernels, unroll=jax.default_backend() == "gpu")


def measure(
    name: str,
    decoder: Decoder,
    *,
    bits: int,
    kv_bits: int,
    batch: int,
    context: int,
    steps: int = 32,
    rounds: int = 8,
) -> DecodeResult:
    """Decodes `steps` greedy tokens a dispatch, `rounds` times after a warm-up, all from about the same context."""
    config, dtype = decoder.config, decoder.dtype
    programs = Programs(decoder)
    room = bucket(context + steps * (rounds + 2), 128)
    cache = CacheState.empty(config, batch, room, dtype, kv_bits == 8)
    cache = dataclasses.replace(cache, lengths_B=jnp.full(batch, context - steps, jnp.int32), kv=_noise(cache.kv))
    sampler, filters = device_sampler(SamplingConfig(), np.zeros(batch))
    rules = Rules(np.asarray([-1], np.int32), np.int32(0))
    zeros = jnp.zeros(batch, jnp.int32)
    loop = Loop(cache, zeros + 1, jnp.zeros(batch, bool), zeros, None, zeros - 1)
    run = dict(filters=filters, logprobs=False, steps=steps, active_length=room)
    seconds = []
    for _ in range(rounds + 2):
        jax.block_until_ready(loop)
        start = time.perf_counter()
        loop, _ = programs._chunk(programs._leaves, sampler, rules, loop=loop, **run)
        jax.block_until_ready(loop)
        seconds.append((time.perf_counter() - start) / steps)
    seconds = seconds[2:]
    step = statistics.median(seconds)
    size = step_bytes(decoder, kv_bits, batch, context)
    stats = jax.devices()[0].memory_stats() or {}
    return DecodeResult(
        name,
        bits,
        kv_bits,
        batch,
        context,
        batch / step,
        step * 1e3,
        min(seconds) * 1e3,
        max(seconds) * 1e3,
        size,
        size / step / 1e9,
        stats.get("peak_bytes_in_use"),
    )


def step_bytes(decoder: Decoder, kv_bits: int, batch: int, context: int) -> int:
    """Bytes a decode step cannot avoid reading: every weight but the embedding's unused rows, and the cache."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
    if decoder.lm_head is not None:
        weights -= decoder.embedding.weight.nbytes
    return weights + batch * context * bytes_per_token(decoder.config, decoder.dtype, kv_bits == 8)


def _noise(kv):
    """Fills a cache with random numbers: zeros would compress, and hide a kernel that reads the wrong ones."""

    def slot(dtype, shape, key):
        if dtype == jnp.uint8:
            return jax.random.bits(key, shape, jnp.uint8)
        return (jax.random.uniform(key, shape, jnp.float32, 0.5, 1.0) / 64).astype(dtype)

    def fill(number, array):
        # A slot of a layer at a time: the generator's own temporaries are four times what it makes.
        keys = jax.random.split(jax.random.key(number), array.shape[0] * array.shape[1])
        slots = jax.lax.map(functools.partial(slot, array.dtype, array.shape[2:]), keys)
        return slots.reshape(array.shape)

    leaves, structure = jax.tree.flatten(kv)
    fills = jax.jit(fill, static_argnums=0, donate_argnums=1)
    return jax.tree.unflatten(structure, [fills(number, leaf) for number, leaf in enumerate(leaves)])

"""Speed of reading a prompt: one whole prefill of a model of true dimensions."""

import dataclasses
import statistics
import time

import jax
import numpy as np

from qwen_jax.bench.decode import programs_of
from qwen_jax.bench.models import MODELS
from qwen_jax.generation import bucket
from qwen_jax.model import Decoder
from qwen_jax.sharding import mesh_name


@dataclasses.dataclass(frozen=True)
class PrefillResult:
    """One measurement: milliseconds of a prefill, median of the rounds, and prompt tokens a second.

    `teraflops` counts matrix products of the layers and causal attention, over all devices.
    """

    model: str
    bits: int
    kv_bits: int
    batch: int
    context: int
    milliseconds: float
    fastest: float
    slowest: float
    tokens_per_second: float
    peak_bytes: int | None
    mesh: str = "1x1"
    teraflops: float | None = None


def measure(
    name: str,
    decoder: Decoder,
    *,
    bits: int,
    kv_bits: int,
    batch: int,
    context: int,
    rounds: int = 5,
    mesh: jax.sharding.Mesh | None = None,
) -> PrefillResult:
    """Reads `batch` random prompts of `context` tokens into a fresh cache, `rounds` times after a warm-up."""
    programs = programs_of(decoder, mesh)
    width = bucket(context)
    ids_BT = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (batch, width)).astype(np.int32)
    lengths_B = np.full(batch, context, np.int32)
    seconds = []
    for _ in range(rounds + 2):
        cache = programs.empty_cache(batch, width, decoder.dtype, kv_bits == 8)
        jax.block_until_ready(cache)
        start = time.perf_counter()
        jax.block_until_ready(programs._read(ids_BT, lengths_B, cache))  # its logits stay where they are
        seconds.append(time.perf_counter() - start)
    seconds = seconds[2:]
    median = statistics.median(seconds)
    stats = jax.local_devices()[0].memory_stats() or {}
    return PrefillResult(
        name,
        bits,
        kv_bits,
        batch,
        context,
        median * 1e3,
        min(seconds) * 1e3,
        max(seconds) * 1e3,
        batch * context / median,
        stats.get("peak_bytes_in_use"),
        mesh_name(mesh),
        operations(name, decoder.config.num_layers, batch, context) / median / 1e12,
    )


def operations(name: str, layers: int, batch: int, context: int) -> float:
    """Multiplications and additions of the layers' matrix products and of causal attention; the head is left out."""
    config = MODELS[name]
    heads = config.num_heads * config.head_dim
    attention = config.hidden_size * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
    weights = attention + 3 * config.hidden_size * config.intermediate_size
    return 2.0 * layers * batch * context * (weights + heads * context)

"""Speed of decoding: whole steps of a model of true dimensions, from a cache that already holds `context` tokens."""

import dataclasses
import functools
import math
import statistics
import time
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from converters.huggingface import Checkpoint
from qwen_jax import fused_decode
from qwen_jax.bench import split
from qwen_jax.bench.models import MODELS
from qwen_jax.bench.random_checkpoint import RandomCheckpoint
from qwen_jax.bench.random_numbers import by_slot
from qwen_jax.bench.random_weights import RandomWeights
from qwen_jax.generation import Loop, Programs, Rules, bucket
from qwen_jax.kv_cache import bytes_per_token
from qwen_jax.loading import CheckpointWeights
from qwen_jax.model import Decoder
from qwen_jax.sampling import SamplingConfig, device_sampler
from qwen_jax.sharded_programs import ShardedPrograms
from qwen_jax.sharded_weights import ShardedWeights
from qwen_jax.sharding import DATA, SEQUENCE, mesh_name

EACH, ONE = "a kernel at a time", "one launch"
RULES = Rules(np.asarray([-1], np.int32), np.int32(0))  # nothing stops


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """One measurement.

    Attributes:
        tokens_per_second: of all rows together, median of the rounds.
        step_ms: milliseconds a step, median; fastest and slowest round beside it.
        bytes_per_step: weights, scales, head and cache that a device must read for a step.
        gigabytes_per_second: of a device: bytes_per_step over the median step.
        peak_bytes: the (first) device's own count, None where it has none.
        mesh: data x model, as 1x2.
        form: of the layers: "a kernel at a time", or "one launch".
        busy_ms: on a mesh of GPUs, milliseconds of a step that the first is busy; reductions_ms of these in XLA's
            reductions (those of one launch are inside it).
        reductions_ms: see busy_ms.
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
    mesh: str = "1x1"
    form: str = EACH
    busy_ms: float | None = None
    reductions_ms: float | None = None


def build(
    name: str,
    *,
    bits: int,
    dtype: str,
    kernels: str = "auto",
    layers: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    one_launch: bool = True,
    as_on_mesh: bool = False,
    lm_head: str | None = None,
) -> Decoder:
    """A model of the named dimensions with random weights; `layers` shortens it, `mesh` spreads it over devices.

    `as_on_mesh`: without a mesh the numbers that one would get, which the host makes, slower than the device.
    `lm_head`: "int8" for a head of 8 bits, on one device.
    """
    if lm_head is not None and (mesh is not None or as_on_mesh):
        raise ValueError(f"lm_head={lm_head!r}: random weights on a mesh have a 16-bit head. Leave one of the two out.")
    config = MODELS[name]
    if layers is not None:
        config = dataclasses.replace(config, num_layers=layers, sliding_layers=(False,) * layers)
    source = cast(Checkpoint, RandomCheckpoint(config, bits=bits, dtype=dtype))
    if mesh is not None:
        weights = ShardedWeights(source, mesh, dtype=dtype, kernels=kernels)
    elif as_on_mesh:
        weights = CheckpointWeights(source, dtype=dtype, kernels=kernels)
    else:
        weights = RandomWeights(config, bits=bits, dtype=dtype, kernels=kernels, lm_head=lm_head)
    unroll = jax.default_backend() == "gpu"
    return Decoder(weights.config, weights, dtype=dtype, kernels=kernels, unroll=unroll, one_launch=one_launch)


def programs_of(decoder: Decoder, mesh: jax.sharding.Mesh | None = None) -> Programs:
    """The compiled functions of a model from `build`."""
    return Programs(decoder) if mesh is None else ShardedPrograms(decoder, mesh)


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
    mesh: jax.sharding.Mesh | None = None,
) -> DecodeResult:
    """Decodes `steps` greedy tokens a dispatch, `rounds` times after a warm-up, all from about the same context.

    Dispatches follow each other as in `Programs.stream`: the next is given before the last one's tokens are read.
    """
    programs = programs_of(decoder, mesh)
    room = _room(context, steps, rounds)
    sampler, filters, loop = _start(programs, decoder, kv_bits, batch, room, context - steps)
    loop = loop._replace(cache=dataclasses.replace(loop.cache, kv=_noise(loop.cache.kv, mesh)))
    sampler, _ = programs._place(sampler, None)
    run = dict(filters=filters, logprobs=False, steps=steps, active_length=room)
    loop, waiting = programs._chunk(programs._leaves, sampler, RULES, loop=loop, **run)  # compiles
    jax.block_until_ready(loop)
    shapes = _of_one_device(loop.cache.kv)
    ends = []
    for _ in range(rounds + 1):
        loop, out = programs._chunk(programs._leaves, sampler, RULES, loop=loop, **run)
        jax.block_until_ready(waiting)
        ends.append(time.perf_counter())
        waiting = out
    jax.block_until_ready(waiting)
    ends.append(time.perf_counter())
    seconds = list(np.diff(ends)[1:] / steps)
    step = statistics.median(seconds)
    size = step_bytes(decoder, kv_bits, batch, context, mesh)
    shares = split.of_step({}, steps)
    if mesh is not None and jax.default_backend() == "gpu":
        once = functools.partial(programs._chunk, programs._leaves, sampler, RULES, **run)
        shares = split.of_step(split.kernels(lambda: once(loop=loop)), steps)
    stats = jax.local_devices()[0].memory_stats() or {}
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
        mesh_name(mesh),
        form_of(decoder, shapes),
        shares["busy_ms"],
        shares["reductions_ms"],
    )


def compile_ahead(
    decoder: Decoder, *, kv_bits: int, batch: int, context: int, steps: int = 32, rounds: int = 8
) -> None:
    """Compiles what `measure` runs on one device into JAX's persistent cache; `decoder` may be of shapes alone."""
    programs, room = Programs(decoder), _room(context, steps, rounds)
    loop = jax.eval_shape(lambda: _start(programs, decoder, kv_bits, batch, room, context - steps)[2])
    sampler, filters = device_sampler(SamplingConfig(), np.zeros(batch))
    run = dict(filters=filters, logprobs=False, steps=steps, active_length=room)
    programs._chunk.func.lower(*programs._chunk.args, programs._leaves, sampler, RULES, loop=loop, **run).compile()


def _room(context: int, steps: int, rounds: int) -> int:
    return bucket(context + steps * (rounds + 2), 128)


def _start(programs: Programs, decoder: Decoder, kv_bits: int, batch: int, room: int, length: int):
    """(sampler, filters, loop) with a cache of `room` tokens a row, `length` of them valid, all zeros."""
    cache = programs.empty_cache(batch, room, decoder.dtype, kv_bits == 8)
    place = programs._rows if isinstance(programs, ShardedPrograms) else jnp.asarray
    slots = cache.lengths_B.shape[0]
    cache = dataclasses.replace(cache, lengths_B=place(np.full(slots, length, np.int32)))
    sampler, filters = device_sampler(SamplingConfig(), np.zeros(slots))
    token_B, done_B, count_B, nonfinite_B = (
        place(np.full(slots, value)) for value in (np.int32(1), False, np.int32(0), np.int32(-1))
    )
    return sampler, filters, Loop(cache, token_B, done_B, count_B, None, nonfinite_B)


def _of_one_device(kv):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), kv)


def form_of(decoder: Decoder, kv) -> str:
    """How a step over this cache (a device's own) walks the layers."""
    if not decoder.one_launch:
        return EACH
    hidden_BTD = jnp.zeros((kv.keys.shape[1], 1, decoder.config.hidden_size), decoder.dtype)
    refusals = [fused_decode.refusal(block, hidden_BTD, kv, block.attention.kernels) for block in decoder.blocks]
    return EACH if any(refusals) else ONE


def step_bytes(decoder: Decoder, kv_bits: int, batch: int, context: int, mesh: jax.sharding.Mesh | None = None) -> int:
    """Bytes a device must read for a decode step: every weight but the embedding's unused rows, and its cache."""
    tables = [] if decoder.lm_head is None else jax.tree.leaves(decoder.embedding)
    weights = sum(map(_bytes_of_a_device, jax.tree.leaves(decoder))) - sum(map(_bytes_of_a_device, tables))
    # On a mesh the decoder's config is that of one device's heads.
    data, sequence = (1, 1) if mesh is None else (mesh.shape[DATA], mesh.shape.get(SEQUENCE, 1))
    tokens = -(-batch // data) * -(-context // sequence)
    return weights + tokens * bytes_per_token(decoder.config, decoder.dtype, kv_bits == 8)


def _bytes_of_a_device(leaf: jax.Array) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _noise(kv, mesh=None):
    """Fills a cache with random numbers: zeros would compress, and hide a kernel that reads the wrong ones."""

    def slot(dtype, key, shape):
        if dtype == jnp.uint8:
            return jax.random.bits(key, shape, jnp.uint8)
        return (jax.random.uniform(key, shape, jnp.float32, 0.5, 1.0) / 64).astype(dtype)

    def fill(number, array):
        return by_slot(jax.random.key(number), array.shape, functools.partial(slot, array.dtype))

    leaves, structure = jax.tree.flatten(kv)
    noisy = []
    for number, leaf in enumerate(leaves):
        one = functools.partial(fill, number)
        if mesh is not None:  # every device its own share, all of them alike
            axes = leaf.sharding.spec
            one = jax.shard_map(one, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
        # On a TPU the cache has a layout of its own; elsewhere naming a place would make one more program of the step.
        where = leaf.format if mesh is not None or jax.default_backend() == "tpu" else None
        noisy.append(jax.jit(one, donate_argnums=0, out_shardings=where)(leaf))
    return jax.tree.unflatten(structure, noisy)

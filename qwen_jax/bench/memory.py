"""Device memory at its peak while a model of true dimensions reads a prompt and decodes, with random weights.

Where the device counts its memory, every case runs in a process of its own (the counter of the peak cannot be reset),
and random weights are made in small parts. Where making them took as much as the run itself, the figure is only an
upper bound, and says so. Where nothing is counted (a CPU), the compiler says what the two programs need, and no weight
is made at all.
"""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.bench import decode, processes
from qwen_jax.generation import CHUNK, Loop, Programs, bucket
from qwen_jax.kv_cache import CacheState
from qwen_jax.model import Decoder
from qwen_jax.sampling import SamplingConfig, device_sampler

NEW_TOKENS = 32
MEASURED = "measured"
BOUND = "at most: making the random weights took as much"
COMPILED = "as compiled: arguments, results and temporaries of the larger program"


def measure(
    model: str,
    *,
    bits: int,
    kv_bits: int,
    batch: int,
    context: int,
    layers: int | None = None,
    dtype: str = "bfloat16",
    kernels: str = "auto",
    one_launch: bool = True,
    lm_head: str | None = None,
    patience: float = 240,
) -> dict[str, Any]:
    """One record.

    Args:
        model: a name in `models.MODELS`.
        bits: of the weights, 4, 8 or 16.
        kv_bits: of the cache, 8 or 16.
        batch: rows.
        context: tokens a row at the end: a prompt, and the last 32 generated.
        layers: only so many.
        dtype: of activations and float weights.
        kernels: as in `from_pretrained`.
        one_launch: likewise.
        lm_head: "int8" for a head of 8 bits.
        patience: seconds that the process may take.
    """
    job = dict(model=model, bits=bits, kv_bits=kv_bits, batch=batch, context=context)
    job |= dict(layers=layers, dtype=dtype, kernels=kernels, one_launch=one_launch, lm_head=lm_head)
    processes.leave_memory()
    if not jax.local_devices()[0].memory_stats():
        return compiled(job)
    command = [sys.executable, "-m", "qwen_jax.bench.memory", json.dumps(job)]
    try:
        done = subprocess.run(command, env=processes.environment(), capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return _named(job) | {"failed": f"not done after {patience:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing on standard error")
        return _named(job) | {"failed": f"its process ended with {done.returncode}: {last}"[:200]}
    return json.loads(lines[-1])


def counted(
    job: Mapping[str, Any], count: Callable[[], Mapping | None] | None = None, decoder: Decoder | None = None
) -> dict[str, Any]:
    """Generates in this process.

    Args:
        job: as `measure` makes it.
        count: the device's counters, by default those of JAX's first device.
        decoder: made from the job in this process, before anything larger was; None to make it here.
    """
    count = jax.local_devices()[0].memory_stats if count is None else count

    def highest() -> int:
        counters = count()
        assert counters is not None  # asked before the process was started
        return counters["peak_bytes_in_use"]

    decoder = build(job) if decoder is None else decoder
    jax.block_until_ready(jax.tree.leaves(decoder))
    making = highest()
    batch, prompt, width, room = _sizes(job)
    ids_BT = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (batch, width)).astype(np.int32)
    programs = Programs(decoder)
    cache = programs.empty_cache(batch, room, decoder.dtype, job["kv_bits"] == 8)
    facts = _named(job) | {"layers": decoder.config.num_layers, **_parts(decoder, cache)}
    lengths_B, seed_B = np.full(batch, prompt, np.int32), np.zeros(batch, np.uint32)
    for _ in programs.stream(ids_BT, lengths_B, cache, SamplingConfig(), seed_B, (), 0, NEW_TOKENS):
        pass
    peak = highest()
    how = MEASURED if peak > making else BOUND
    rest = peak - facts["weight_bytes"] - facts["cache_bytes"]
    return facts | {"how": how, "peak_bytes": peak, "peak_bytes_of_making": making, "rest_bytes": rest}


def compiled(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the compiler says of prefill and of a chunk of decode steps, from shapes alone."""
    decoder = jax.eval_shape(lambda: build(job))
    batch, _, width, room = _sizes(job)
    programs = Programs(decoder)
    make = functools.partial(CacheState.empty, decoder.config, batch, room, decoder.dtype, job["kv_bits"] == 8)
    cache = jax.eval_shape(make)
    numbers_B, ids_BT = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch,), (batch, width)))
    facts = _named(job) | {"layers": decoder.config.num_layers, **_parts(decoder, cache)}
    sampler, filters = device_sampler(SamplingConfig(), np.zeros(batch))
    alpha_B = jax.ShapeDtypeStruct((batch,), jnp.float32) if decoder.config.use_dynamic_ntk else None
    full = dataclasses.replace(cache, ntk_alpha_B=alpha_B)  # as prefill leaves it
    loop = Loop(full, numbers_B, jax.ShapeDtypeStruct((batch,), bool), numbers_B, None, numbers_B)
    run = dict(filters=filters, logprobs=False, steps=CHUNK, active_length=room)
    lowered = (
        programs._prefill.func.lower(*programs._prefill.args, programs._leaves, ids_BT, numbers_B, cache=cache),
        programs._chunk.func.lower(*programs._chunk.args, programs._leaves, sampler, decode.RULES, loop=loop, **run),
    )
    peak = 0
    for program in lowered:
        memory = program.compile().memory_analysis()
        if memory is None:
            return facts | {"failed": "this device's compiler says nothing of memory"}
        inside = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        peak = max(peak, inside + memory.output_size_in_bytes - memory.alias_size_in_bytes)
    rest = peak - facts["weight_bytes"] - facts["cache_bytes"]
    return facts | {"how": COMPILED, "peak_bytes": peak, "rest_bytes": rest}


def _named(job: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: job[key] for key in ("model", "bits", "kv_bits", "batch", "context", "dtype")}
    return named if job.get("lm_head") is None else named | {"lm_head": job["lm_head"]}


def build(job: Mapping[str, Any]) -> Decoder:
    """The model of a job."""
    names = ("bits", "dtype", "kernels", "layers", "one_launch", "lm_head")
    options: dict[str, Any] = {name: job.get(name) for name in names}
    return decode.build(job["model"], **options)


def _sizes(job: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(rows, tokens of the prompt, width it is padded to, room of the cache)."""
    prompt = max(1, job["context"] - NEW_TOKENS)
    width = bucket(prompt)
    return job["batch"], prompt, width, max(width, bucket(prompt + NEW_TOKENS, 128))


def _parts(decoder, cache) -> dict[str, int]:
    def size(tree) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    return {"weight_bytes": size(decoder), "cache_bytes": size(cache)}


if __name__ == "__main__":
    print(json.dumps(counted(json.loads(sys.argv[1]))), flush=True)

"""A model on a mesh beside the same model on one device of it: greedy tokens, and how many times as fast."""

import math
from typing import Any

import numpy as np

from qwen_jax.generation import Programs
from qwen_jax.sampling import SamplingConfig

PROMPT, TOKENS, ROOM = 12, 16, 64


def greedy(programs: Programs, dtype: str, kv_bits: int, batch: int) -> np.ndarray:
    """int32 [batch, TOKENS] after prompts that differ from row to row."""
    ids_BT = np.random.default_rng(0).integers(0, programs.config.vocab_size, (batch, PROMPT)).astype(np.int32)
    cache = programs.empty_cache(batch, ROOM, dtype, kv_bits == 8)
    lengths_B, seed_B = np.full(batch, PROMPT, np.int32), np.zeros(batch, np.uint32)
    chunks = programs.stream(ids_BT, lengths_B, cache, SamplingConfig(), seed_B, (), 0, TOKENS)
    return np.concatenate([chunk.tokens_BN for chunk in chunks], axis=1)


def compare(mesh_result: dict[str, Any], one: dict[str, Any], want_BN: np.ndarray, got_BN: np.ndarray) -> dict:
    """What a result on a mesh says of the one device: its time, how many times as fast, what of each device's share.

    `same_tokens` is "equal", or names the first token that differs: rounding differs between the two, so that ties in
    16 bits may fall otherwise.
    """
    time = "step_ms" if "step_ms" in one else "milliseconds"
    devices = math.prod(map(int, mesh_result["mesh"].split("x")))
    times = one[time] / mesh_result[time]
    differ = np.argwhere((want_BN != got_BN).T)  # the earliest token first
    same = f"row {differ[0, 1]} differs at token {differ[0, 0]}" if len(differ) else "equal"
    return {"one_device_ms": one[time], "times": times, "efficiency": times / devices, "same_tokens": same}

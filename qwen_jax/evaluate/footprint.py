"""What running a model takes: peak memory and decode speed, measured where JAX runs."""

import statistics
import time
from pathlib import Path

import numpy as np
import psutil

from qwen_jax.memory import device_peak, host_peak, reset_host_peak

PROMPT, NEW = 128, 64  # tokens read and generated


def footprint(name: str | Path, quantized_cache: bool, dtype: str = "auto") -> tuple[float, int | None]:
    """(decode tokens a second of one row, peak bytes of loading, reading and generating).

    Bytes are the accelerator's own count; on a CPU, by how much the process grew. An accelerator's peak is that of the
    whole process: None where this model stayed below what was reached before, so measure the small ones first.
    """
    from qwen_jax.causal_lm import QwenForCausalLM

    reset_host_peak()
    device_before, host_before = device_peak(), psutil.Process().memory_info().rss
    model = QwenForCausalLM.from_pretrained(
        name, dtype=dtype, use_cache_quantization=quantized_cache, max_length=PROMPT + NEW
    )
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT).tolist()
    speeds = []
    for _ in range(2):  # the first compiles
        last, speeds = time.perf_counter(), []
        for number, chunk in enumerate(model.stream([prompt], max_new_tokens=NEW, do_sample=False, eos_token_id=[])):
            now = time.perf_counter()
            if number:  # before it the prompt was read
                speeds.append(chunk.tokens_BN.shape[1] / (now - last))
            last = now
    speed = statistics.median(speeds[:-1] or speeds)  # the last chunk may hold fewer tokens than were computed
    after = device_peak()
    if after is None:
        return speed, max(host_peak() - host_before, 0)
    return speed, after if after > (device_before or 0) else None

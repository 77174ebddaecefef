"""The demo's checkpoints in the user's cache: float, Int4 (GPTQ files), and the same converted to our own format."""

import dataclasses
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..cache_folder import cache_folder
from ..tokenizer import AutoTokenizer
from .smollm2 import smollm2_folder

GROUP_SIZE = 64  # the hidden size is 576 = 9 · 64
ROWS, ROW_LENGTH = 8, 512  # of calibration: more takes longer than a first start should, and gains little

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class DemoCheckpoints:
    """Where the three lie.

    Attributes:
        source: float16, Qwen2 layout, Hugging Face files.
        quantized: Int4 in groups of 64, asymmetric, made with GPTQ on Python's documentation, AutoGPTQ's files.
        converted: the same as `qwen-jax convert` writes it.
    """

    source: Path
    quantized: Path
    converted: Path


def demo_checkpoints(progress: Progress = lambda step, done, total: None) -> DemoCheckpoints:
    """Makes whichever of the three is missing; a second process waits for the first.

    Args:
        progress: called with what is being made, the steps done and their number.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / "demo.lock"):
        return _make(progress)


def _make(progress: Progress) -> DemoCheckpoints:
    source = smollm2_folder(lambda done, total: progress("Reading the GGUF file", done, total))
    quantized = source.with_name(f"{source.name}-GPTQ-Int4-g{GROUP_SIZE}")
    converted = quantized.with_name(f"{quantized.name}-converted")
    if not quantized.is_dir():
        from ..quantize import QuantizeSettings, quantize

        quantize(
            source,
            quantized,
            calibration_rows(source),
            QuantizeSettings(group_size=GROUP_SIZE, sym=False, format="gptq_v2"),
            progress=lambda report, done, total: progress("Quantizing to Int4 (once)", done, total),
        )
    if not converted.is_dir():
        from ..checkpoint_store import convert

        progress("Converting", 0, 1)
        convert(quantized, converted)
        progress("Converting", 1, 1)
    return DemoCheckpoints(source, quantized, converted)


def calibration_rows(source: Path) -> list[np.ndarray]:
    """Rows of token ids, evenly from the second half of a text that every Python brings along: its documentation."""
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = np.asarray(AutoTokenizer.from_pretrained(source).encode(text[len(text) // 2 :]), np.int32)
    starts = np.linspace(0, len(ids) - ROW_LENGTH, ROWS).astype(int)
    return [ids[start : start + ROW_LENGTH] for start in starts]

"""The demo's checkpoints in the user's cache: float, Int4 (GPTQ files), and the same converted to our own format."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from converters.folders import complete_or_absent

from .smollm2 import smollm2_folder

GROUP_SIZE = 64  # the hidden size is 576 = 9 · 64

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class DemoCheckpoints:
    """Where the three lie.

    Attributes:
        source: float16, Qwen2 layout, Hugging Face files.
        quantized: Int4 in groups of 64, asymmetric, layers' matrices rounded to nearest, AutoGPTQ's files.
        converted: the same as `qwen-jax convert` writes it.
    """

    source: Path
    quantized: Path
    converted: Path


def demo_checkpoints(progress: Progress = lambda step, done, total: None) -> DemoCheckpoints:
    """Makes whichever of the three is missing.

    Args:
        progress: called with what is being made, the steps done and their number.
    """
    source = smollm2_folder(lambda done, total: progress("Reading the GGUF file", done, total))
    quantized = source.with_name(f"{source.name}-Int4-g{GROUP_SIZE}")
    converted = source.with_name(f"{source.name}-Int4-g{GROUP_SIZE}-converted")
    if not quantized.is_dir():
        from ..quantize.round_to_nearest import quantize_folder

        with complete_or_absent(quantized) as folder:
            quantize_folder(
                source,
                folder,
                group_size=GROUP_SIZE,
                progress=lambda done, total: progress("Rounding to Int4", done, total),
            )
    if not converted.is_dir():
        from ..checkpoint_store import convert

        progress("Converting", 0, 1)
        convert(quantized, converted)
        progress("Converting", 1, 1)
    return DemoCheckpoints(source, quantized, converted)

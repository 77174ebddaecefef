"""Rounding to nearest: each weight to the closest point of its group's grid, without calibration data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from converters import writer
from converters.huggingface import Checkpoint, Module
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.layout import from_integers
from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json


def round_to_nearest(weight_IO: np.ndarray, *, bits: int, group_size: int, symmetric: bool = False) -> QuantizedTensor:
    """The quantized matrix whose every weight is nearest to the given one, on a grid spanned by its group's extremes.

    Symmetric: scale = max|w| / (2^(bits − 1) − 1), zero-point 2^(bits − 1). Asymmetric: scale = (max − min) /
    (2^bits − 1), the range widened to hold 0, so that a zero weight stays exactly 0. Weights are rounded on the scale
    as it is stored, float16. A group of zeros gets scale 1.

    Args:
        weight_IO: [in, out], finite floats.
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; −1 for all of them. The last group may be short.
        symmetric: one zero-point for all groups; else each has its own, which fits skewed groups better.

    Raises:
        ValueError: non-finite weights, or too large for float16 scales.
    """
    weight_IO = np.asarray(weight_IO, np.float32)
    in_features, out_features = weight_IO.shape
    rows = in_features if group_size == -1 else group_size
    groups = -(-in_features // rows)
    padded_GRO = np.pad(weight_IO, ((0, groups * rows - in_features), (0, 0))).reshape(groups, rows, out_features)
    low_GO, high_GO = padded_GRO.min(1), padded_GRO.max(1)  # the padding's zeros lie inside every range below
    highest = (1 << bits) - 1
    if symmetric:
        scales_GO = np.maximum(-low_GO, high_GO) / (highest // 2)
    else:
        low_GO, high_GO = np.minimum(low_GO, 0), np.maximum(high_GO, 0)
        scales_GO = (high_GO - low_GO) / highest
    if not np.isfinite(scales_GO).all() or scales_GO.max() > np.finfo(np.float16).max:
        raise ValueError("weight_IO: weights are not finite, or too large for float16 scales. Check the checkpoint.")
    stored_GO = scales_GO.astype(np.float16)
    stored_GO[stored_GO == 0] = 1  # all zero, or below float16's 6e-8: every weight rounds to 0 either way
    scales_GO = stored_GO.astype(np.float32)
    if symmetric:
        zeros_GO = np.full_like(scales_GO, highest // 2 + 1)
    else:
        zeros_GO = np.clip(np.rint(-low_GO / scales_GO), 0, highest)
    q_GRO = np.clip(np.rint(padded_GRO / scales_GO[:, None]) + zeros_GO[:, None], 0, highest)
    q_IO = q_GRO.reshape(groups * rows, out_features)[:in_features].astype(np.uint8)
    zeros = None if symmetric else zeros_GO.astype(np.uint8)
    return from_integers(q_IO, stored_GO, zeros, bits=bits, group_size=group_size)


def quantize_folder(
    source: Path,
    target: Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a GPTQ checkpoint of a float one; only the layers' matrices are rounded.

    Embedding, head, norms and biases stay as they are, and so do tokenizer and generation settings.

    Args:
        source: a float Hugging Face folder.
        target: the folder to write, complete or not at all; an empty one may be there.
        bits: see `round_to_nearest`, as group_size and symmetric.
        group_size: inputs that share a scale.
        symmetric: one zero-point for all groups.
        progress: called with the matrices done and their number.

    Raises:
        CheckpointError: the source cannot be read or is quantized already.
    """
    checkpoint = Checkpoint(source)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{source}: is quantized already ({checkpoint.quantization.where}); expected a float one."
        )
    settings = {"bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": False, "quant_method": "gptq"}
    # v1 has no place for a zero-point of 0, which a group of positive weights has
    settings["checkpoint_format"] = "gptq" if symmetric else "gptq_v2"
    total = sum(path.startswith("layers.") and not path.endswith(".scale") for path in checkpoint.paths)

    def parameters():
        done = 0
        for path in checkpoint.paths:
            if path.endswith(".scale"):
                yield path, checkpoint.read_vector(path)
                continue
            module = checkpoint.read(path)
            if not path.startswith("layers."):
                yield path, module
                continue
            weight = round_to_nearest(module.weight.data.T, bits=bits, group_size=group_size, symmetric=symmetric)
            yield path, Module(weight, module.bias)
            done += 1
            progress(done, total)

    config = read_json(source / "config.json")
    writer.write(target, parameters(), config=config, quantization=settings, source=source)

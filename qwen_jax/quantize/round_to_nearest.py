"""Rounding to nearest: each weight to the closest point of its group's grid, without calibration data."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from converters import gptq, names
from converters.folders import copy_side_files
from converters.huggingface import Checkpoint
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.layout import from_integers
from qwen_jax.config import QuantizationConfig
from qwen_jax.errors import CheckpointError


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
    """Writes a GPTQ checkpoint of a float one into an existing empty folder; only the layers' matrices are rounded.

    Embedding, head, norms and biases stay as they are, and so do tokenizer and generation settings.

    Args:
        source: a float Hugging Face folder.
        target: where to write; the caller makes it, and takes care that an interruption leaves nothing half done.
        bits: see `round_to_nearest`, as group_size and symmetric.
        group_size: inputs that share a scale.
        symmetric: one zero-point for all groups.
        progress: called with the matrices done and their number.

    Raises:
        CheckpointError: the source cannot be read or is quantized already.
    """
    checkpoint = Checkpoint(source)
    settings = {"bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": False, "quant_method": "gptq"}
    # v1 has no place for a zero-point of 0, which a group of positive weights has
    settings["checkpoint_format"] = "gptq" if symmetric else "gptq_v2"
    config = QuantizationConfig.from_dict(settings, str(target / "quantize_config.json"))
    family = checkpoint.config.family
    vectors = [path for path in checkpoint.paths if path.endswith(".scale")]
    matrices = [path for path in checkpoint.paths if path not in vectors]
    total = sum(path.startswith("layers.") for path in matrices)
    tensors = {f"{names.theirs(family, path)}.weight": checkpoint.read_vector(path) for path in vectors}
    done = 0
    for path in matrices:
        module, name = checkpoint.read(path), names.theirs(family, path)
        matrix = module.weight
        if not isinstance(matrix, DenseTensor):
            raise CheckpointError(f"{source}: {name} is quantized already, expected a float checkpoint.")
        if names.may_have_bias(checkpoint.config, path):
            zero = np.zeros(matrix.out_features, matrix.dtype)
            tensors[f"{name}.bias"] = zero if module.bias is None else module.bias
        if not path.startswith("layers."):
            tensors[f"{name}.weight"] = matrix.data
            continue
        weight = round_to_nearest(matrix.data.T, bits=bits, group_size=group_size, symmetric=symmetric)
        tensors |= {f"{name}.{part}": array for part, array in gptq.write(weight, config).items()}
        done += 1
        progress(done, total)
    # safetensors writes memory order under the logical shape: everything has to be contiguous
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, target / "model.safetensors")
    model_json = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(model_json | {"quantization_config": settings}, indent=2) + "\n")
    (target / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    copy_side_files(source, target)

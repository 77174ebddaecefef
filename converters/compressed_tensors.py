"""llm-compressor's compressed-tensors format "pack-quantized" ↔ `QuantizedTensor`.

A module in the file: `weight_packed` int32 [out, ceil(in·bits/32)] (a bit stream along each row, integers shifted by
2^(bits − 1) to be unsigned), `weight_scale` [out, groups], `weight_shape` [2] (out, in), for asymmetric weights
`weight_zero_point` int32 [ceil(out·bits/32), groups] (shifted likewise, a bit stream down the outputs), and with
act-order by groups `weight_g_idx` [in]. Transposed, the packed words are those of GPTQ's `qweight`.
"""

from collections.abc import Mapping

import numpy as np

from converters import gptq
from converters.safetensors_files import Runs, at_runs, length
from pallas_kernels.quantized_matmul import layout
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from qwen_jax.config import QuantizationConfig
from qwen_jax.errors import CheckpointError
from qwen_jax.quantization_config import ModuleSettings

PACKED, SCALES = "weight_packed", "weight_scale"


def required(settings: ModuleSettings) -> tuple[str, ...]:
    """Tensors that a module must have."""
    return (PACKED, SCALES) if settings.sym else (PACKED, SCALES, "weight_zero_point")


def shapes(settings: ModuleSettings, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """The shape that each of a module's tensors must have; a symmetric module has no zero-points."""
    _, groups = gptq.group_size_and_count(settings, in_features)
    expected = {
        "weight_packed": (out_features, layout.words(in_features, settings.bits)),
        "weight_scale": (out_features, groups),
        "weight_shape": (2,),
        "weight_g_idx": (in_features,),
    }
    if not settings.sym:
        expected["weight_zero_point"] = (layout.words(out_features, settings.bits), groups)
    return expected


def read_zeros(
    parts: Mapping[str, np.ndarray], settings: ModuleSettings, config: QuantizationConfig, out_features: int, where: str
) -> tuple[np.ndarray | None, str]:
    """The zero-points, uint8 [groups, out], None if every one is 2^(bits − 1); they are stored as they are ("v2")."""
    del config, where
    if settings.sym:
        return None, "v2"
    zeros = layout.unpack(parts["weight_zero_point"], settings.bits, out_features).T
    return (None if (zeros == 1 << (settings.bits - 1)).all() else np.ascontiguousarray(zeros)), "v2"


def read_permutation(
    parts: Mapping[str, np.ndarray], settings: ModuleSettings, in_features: int, where: str
) -> np.ndarray | None:
    """The input that each row, sorted by group, multiplies: int32 [in]; None for the natural order."""
    index = parts.get("weight_g_idx")
    if index is None or (index < 0).any():  # −1: llm-compressor's "not set"
        return None
    return gptq.read_permutation({"g_idx": index}, settings, in_features, where)


def boxes(settings: ModuleSettings, rows: Runs | None, columns: Runs | None) -> dict[str, tuple]:
    """See `gptq.boxes`."""
    boxes = gptq.boxes(settings, rows, columns)
    return {PACKED: boxes[gptq.PACKED][::-1], SCALES: boxes[gptq.SCALES][::-1]}


def read(
    parts: Mapping[str, np.ndarray],
    settings: ModuleSettings,
    config: QuantizationConfig,
    in_features: int,
    where: str,
    rows: Runs | None = None,
    columns: Runs | None = None,
    out_features: int | None = None,
) -> QuantizedTensor:
    """A module's tensors as a `QuantizedTensor` of NumPy arrays, in layout "gptq"; arguments as `gptq.read`.

    Raises:
        CheckpointError: if `weight_shape` or `weight_g_idx` contradict the settings.
    """
    width: int = out_features or parts[SCALES].shape[0]
    shape = parts.get("weight_shape")
    if shape is not None and tuple(shape) != (width, in_features):
        raise CheckpointError(f"{where}.weight_shape: is {shape.tolist()}, expected [{width}, {in_features}].")
    zeros, _ = read_zeros(parts, settings, config, width, where)
    permutation = read_permutation(parts, settings, in_features, where)
    packed = np.ascontiguousarray(parts[PACKED].T)
    packed = gptq.reorder(packed, permutation, settings.bits, in_features, rows)
    group_size, _ = gptq.group_size_and_count(settings, in_features)
    scales = np.ascontiguousarray(parts[SCALES].T)
    zeros = gptq.part_of_zeros(zeros, settings, rows, columns)
    permutation = None if permutation is None else at_runs(permutation, rows, 0)
    in_features = in_features if rows is None else length(rows)
    return QuantizedTensor(packed, scales, zeros, permutation, settings.bits, group_size, in_features)


def write(weight: QuantizedTensor, config: QuantizationConfig) -> dict[str, np.ndarray]:
    """The inverse of `read`: weight_packed, weight_scale, weight_shape and, where there are any, the other two.

    Raises:
        ValueError: for a stacked or prepacked tensor, or zero-points in a checkpoint that `config` calls symmetric.
    """
    if weight.zeros is not None and config.sym:
        raise ValueError(f"{config.where}: symmetric is true, but the weight has zero-points other than 2^(bits − 1).")
    packed, g_idx = gptq.natural_order(weight)
    parts = {
        "weight_packed": packed.T,
        "weight_scale": np.asarray(weight.scales).T,
        "weight_shape": np.array([weight.out_features, weight.in_features], np.int64),
    }
    if not config.sym:
        parts["weight_zero_point"] = layout.pack(gptq.zeros_of(weight).T, weight.bits)
    if weight.permutation is not None:
        parts["weight_g_idx"] = g_idx
    return {name: np.ascontiguousarray(part) for name, part in parts.items()}

"""The way back: a converted checkpoint written as the Hugging Face folder it came from."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters import orbax
from converters.huggingface import Module, write
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.config import ModelConfig, QuantizationConfig
from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json
from qwen_jax.loading import FUSED

LAYER_NORMS = ("attention_norm", "mlp_norm", "attention.query_norm", "attention.key_norm")


def export(source: str | Path, target: str | Path) -> None:
    """Writes what `convert` read: a GPTQ, compressed-tensors or float folder, its tensors the same to the byte.

    Biases and norms, which a converted checkpoint holds in float32, are written in the dtype of the weights (norms:
    config.json's) wherever that loses nothing.

    Raises:
        CheckpointError: the source is no converted checkpoint, or the target exists.
    """
    folder = Path(source)
    if not orbax.is_checkpoint(folder):
        raise CheckpointError(f"{folder}: is no converted checkpoint, expected one that `qwen-jax convert` wrote.")
    quantization = QuantizationConfig.from_folder(folder)
    write(
        target,
        _parameters(folder),
        config=read_json(folder / "config.json"),
        quantization=None if quantization is None else quantization.raw,
        source=folder,
    )


def _parameters(folder: Path) -> Iterator[tuple[str, Any]]:
    """(our path, Module or norm) of every parameter, cut out of the stacks and fused matrices."""
    arrays, metadata = orbax.restore(folder)
    config, modules = ModelConfig.from_folder(folder), metadata["modules"]
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    yield "embedding", _module("embedding", modules, arrays)
    if "lm_head" in modules:
        yield "lm_head", _module("lm_head", modules, arrays)
    yield "final_norm.scale", _narrow(arrays["final_norm.scale"], config.dtype)
    for start, stop in metadata["blocks"]:
        block = f"layers.{start}-{stop - 1}"
        for layer in range(start, stop):
            here = layer - start
            for norm in LAYER_NORMS:
                if f"{block}.{norm}.scale" in arrays:
                    scale = arrays[f"{block}.{norm}.scale"][here]
                    yield f"layers.{layer}.{norm}.scale", _narrow(scale, config.dtype)
            for name in ("attention.output", "mlp.down"):
                yield f"layers.{layer}.{name}", _module(f"{block}.{name}", modules, arrays, here)
            for path, outputs in FUSED.items():
                fused = path == "attention" and config.family == "qwen"
                name, done = f"{block}.{path}", 0
                for number, widths in enumerate(modules[name]["sizes"]):
                    names = outputs[done : done + len(widths)]
                    done += len(widths)
                    whole = _module(f"{name}.{number}", modules, arrays, here)
                    separate = arrays.get(f"{name}.separate_bias")
                    if separate is not None and "key" in names:
                        whole = _with_key_bias(whole, separate[here], names, widths)
                    if fused:
                        names, widths = ("qkv",), [sum(widths)]
                    for output, part in zip(names, _split(whole, widths), strict=True):
                        yield f"layers.{layer}.{path}.{output}", part


def _module(name: str, modules, arrays, layer: int | None = None) -> Module:
    statics = dict(modules[name])
    part = {}
    for leaf in ("packed", "scales", "zeros", "permutation", "data", "bias"):
        array = arrays.get(f"{name}.{leaf}")
        part[leaf] = array if array is None or layer is None else array[layer]
    bias, data = part.pop("bias"), part.pop("data")
    if statics.pop("kind") == "quantized":
        return Module(QuantizedTensor(**part, **statics), bias)
    return Module(DenseTensor(data, **statics), bias)


def _with_key_bias(module: Module, key_bias: np.ndarray, names, widths) -> Module:
    """The fused matrix with the key's bias, which is kept apart, back in its columns."""
    bias = np.zeros(sum(widths), np.float32) if module.bias is None else module.bias.copy()
    start = sum(widths[: names.index("key")])
    bias[start : start + len(key_bias)] = key_bias
    return Module(module.weight, bias)


def _split(module: Module, widths) -> Iterator[Module]:
    """The matrices that were fused along `out`; an all-zero bias is none."""
    weight, start = module.weight, 0
    for width in widths:
        columns = slice(start, start + width)
        start += width
        bias = None
        if module.bias is not None and module.bias[columns].any():
            bias = _narrow(
                module.bias[columns], weight.dtype if isinstance(weight, DenseTensor) else weight.scales.dtype
            )
        if isinstance(weight, DenseTensor):
            yield Module(dataclasses.replace(weight, data=weight.data[columns]), bias)  # "transposed": [out, in]
            continue
        parts = {name: getattr(weight, name) for name in ("packed", "scales", "zeros")}
        cut = {name: None if array is None else array[:, columns] for name, array in parts.items()}
        yield Module(dataclasses.replace(weight, **cut), bias)


def _narrow(array: np.ndarray, dtype) -> np.ndarray:
    """The array in `dtype` if that is exact, else as it is."""
    narrow = array.astype(dtype)
    return narrow if np.array_equal(narrow.astype(array.dtype), array) else array

"""The way back: a converted checkpoint written as the Hugging Face folder it came from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters import names, orbax
from converters.huggingface import Module, write
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.config import QuantizationConfig
from qwen_jax.converted_modules import ConvertedModules
from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json
from qwen_jax.read_progress import Progress


def export(source: str | Path, target: str | Path, progress: Progress | None = None) -> None:
    """Writes what `convert` read: a GPTQ, compressed-tensors or float folder, its tensors the same to the byte.

    Biases and norms, which a converted checkpoint holds in float32, are written in the dtype of the weights (norms:
    config.json's) wherever that loses nothing. `progress` is called with the matrices written so far and
    their number.

    Raises:
        CheckpointError: the source is no converted checkpoint, or the target exists.
    """
    folder = Path(source)
    if not orbax.is_checkpoint(folder):
        raise CheckpointError(f"{folder}: is no converted checkpoint, expected one that `qwen-jax convert` wrote.")
    quantization = QuantizationConfig.from_folder(folder)
    write(
        target,
        _parameters(folder, progress),
        config=read_json(folder / "config.json"),
        quantization=None if quantization is None else quantization.raw,
        source=folder,
    )


def _parameters(folder: Path, progress: Progress | None = None) -> Iterator[tuple[str, Any]]:
    """(our path, Module or norm) of every parameter, read one at a time; an all-zero bias is none."""
    converted = ConvertedModules(folder)
    modules, vectors = names.modules(converted.config), names.vectors(converted.config)
    for done, path in enumerate(modules, 1):
        module = converted.read(path)
        bias = module.bias if module.bias is not None and module.bias.any() else None
        yield path, Module(module.weight, None if bias is None else _narrow(bias, _dtype(module.weight)))
        if progress is not None:
            progress(done, len(modules))
    for path in vectors:
        yield path, _narrow(converted.read_vector(path), converted.config.dtype)


def _dtype(weight: DenseTensor | QuantizedTensor):
    return weight.dtype if isinstance(weight, DenseTensor) else weight.scales.dtype


def _narrow(array: np.ndarray, dtype) -> np.ndarray:
    """The array in `dtype` if that is exact, else as it is."""
    narrow = array.astype(dtype)
    return narrow if np.array_equal(narrow.astype(array.dtype), array) else array

"""Writing a Hugging Face folder, float or quantized, a module at a time."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from converters import compressed_tensors, gptq, names
from converters.folders import complete_or_absent, copy_side_files
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from qwen_jax.config import ModelConfig, QuantizationConfig
from qwen_jax.quantization_config import ModuleSettings

FORMATS = {"gptq": gptq, "compressed-tensors": compressed_tensors}


@dataclasses.dataclass(frozen=True)
class Module:
    """A matrix and its bias.

    Attributes:
        weight: QuantizedTensor in layout "gptq" or DenseTensor in layout "transposed" or "plain", not stacked.
        bias: [out]; None where there is none or an all-zero one.
    """

    weight: Any
    bias: np.ndarray | None = None


def write(
    folder: str | Path,
    parameters: Iterable[tuple[str, Any]],
    *,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
    source: str | Path | None = None,
    zero_biases: bool | None = None,
    max_shard_bytes: int = 2 << 30,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that AutoGPTQ, GPTQModel, compressed-tensors or transformers read; complete or not at all.

    `Checkpoint.read` of every path, written with the same settings, gives the same tensors to the byte.

    Args:
        folder: to be made.
        parameters: (our path, a `Module`) and (our path of a norm, array) in any order; taken one at a time, held up to
            `max_shard_bytes`.
        config: the JSON of config.json; its quantization section is replaced.
        quantization: the JSON of quantize_config.json (method "gptq"), or compressed-tensors' section; None for float.
        source: a folder whose tokenizer and generation settings are copied.
        zero_biases: whether quantized modules without a bias get one of zeros, as in AutoGPTQ's files; by default where
            `quantization` looks like AutoGPTQ's (no `meta`). Biases that the family always has are written anyway.
        max_shard_bytes: beyond it, further files and an index.
        overwrite: replace a folder that is there.

    Raises:
        ValueError: for a parameter that is missing, given twice, unknown, of a wrong shape, or in contradiction to the
            settings.
        CheckpointError: if the folder is there, or `config` or `quantization` is not valid.
    """
    model = ModelConfig.from_dict(config, "config")
    settings = None if quantization is None else QuantizationConfig.from_dict(quantization, "quantization")
    if zero_biases is None:
        zero_biases = settings is not None and settings.method == "gptq" and "meta" not in settings.raw
    expected: dict[str, Any] = names.modules(model) | names.vectors(model)
    with complete_or_absent(folder, overwrite) as temporary:
        shards = _Shards(temporary, max_shard_bytes)
        for path, parameter in parameters:
            if path not in expected:
                raise ValueError(f"{path!r} is no parameter of this model, or was given twice.")
            shape = expected.pop(path)
            name = names.theirs(model.family, path)
            if isinstance(shape, int):
                tensors = {"weight": _checked(path, np.asarray(parameter), (shape,))}
            else:
                tensors = _module_tensors(path, name, parameter, shape, settings)
                always = names.may_have_bias(model, path)
                if "bias" not in tensors and (always or (zero_biases and "weight" not in tensors)):
                    scales = next(tensors[each] for each in ("scales", "weight_scale", "weight") if each in tensors)
                    tensors["bias"] = np.zeros(shape[1], scales.dtype)
            shards.add({f"{name}.{part}": np.ascontiguousarray(tensor) for part, tensor in tensors.items()})
        if expected:
            raise ValueError(f"parameters are missing: {', '.join(sorted(expected)[:5])} ({len(expected)} in all).")
        shards.finish()
        _write_json(temporary, config, quantization, settings)
        if source is not None:
            copy_side_files(source, temporary)


def _module_tensors(
    path: str, name: str, module: Any, shape: tuple[int, int], config: QuantizationConfig | None
) -> dict[str, np.ndarray]:
    weight, settings = module.weight, None if config is None else config.for_module(name)
    found = (weight.in_features, weight.out_features)
    if found != shape or weight.stack:
        raise ValueError(
            f"{path}: is {weight.stack} matrices of [in, out] {list(found)}, expected one of {list(shape)}."
        )
    if isinstance(weight, QuantizedTensor):
        _refuse_contradiction(path, weight, settings)
        assert config is not None
        tensors = FORMATS[config.method].write(weight, config)
    elif settings is not None:
        raise ValueError(f"{path}: is a float matrix, but by {settings.rule} it has {settings.bits} bits.")
    elif weight.layout not in ("transposed", "plain"):
        raise ValueError(f"{path}: layout is {weight.layout!r}, expected 'transposed' or 'plain'.")
    else:
        data = np.asarray(weight.data)
        tensors = {"weight": data if weight.layout == "transposed" else data.T}
    if module.bias is not None:
        tensors["bias"] = _checked(f"{path}: bias", np.asarray(module.bias), shape[1:])
    return tensors


def _refuse_contradiction(path: str, weight: QuantizedTensor, settings: ModuleSettings | None) -> None:
    if settings is None:
        raise ValueError(f"{path}: has {weight.bits} bits, but by the settings it is a float module.")
    group_size, _ = gptq.group_size_and_count(settings, weight.in_features)
    if (weight.bits, weight.group_size) != (settings.bits, group_size):
        raise ValueError(
            f"{path}: has {weight.bits} bits and group_size {weight.group_size}, but by {settings.rule} it has "
            f"{settings.bits} and {group_size}."
        )


def _checked(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape:
        raise ValueError(f"{path}: shape {list(array.shape)}, expected {list(shape)}.")
    return array


def _write_json(
    folder: Path, config: Mapping[str, Any], quantization: Mapping[str, Any] | None, settings: QuantizationConfig | None
) -> None:
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    files = {"config.json": kept}
    if quantization is not None and settings is not None:
        section = {**quantization, "quant_method": settings.method}
        kept["quantization_config"] = section
        if settings.method == "gptq":
            files["quantize_config.json"] = section
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Shards:
    """Collects tensors and writes a file whenever the next ones would make it too large."""

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._held: dict[str, np.ndarray] = {}
        self._bytes, self._total = 0, 0
        self._placed: list[list[str]] = []

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes the tensors of one module, which stay in one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._held and self._bytes + size > self._max_bytes:
            self._flush()
        self._held |= tensors
        self._bytes += size
        self._total += size

    def finish(self) -> None:
        """Writes the rest; gives the files their final names and, if there are several, an index."""
        self._flush()
        count, weight_map = len(self._placed), {}
        for number, held in enumerate(self._placed, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._file(number).rename(self._folder / final)
            weight_map |= dict.fromkeys(held, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            path = self._folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        self._placed.append(list(self._held))
        save_file(self._held, self._file(len(self._placed)), metadata={"format": "pt"})
        self._held, self._bytes = {}, 0

    def _file(self, number: int) -> Path:
        return self._folder / f"shard-{number}"

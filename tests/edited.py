"""Golden checkpoints with one thing changed, for the tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from converters.huggingface import Checkpoint, Module, write
from pallas_kernels.quantized_matmul import layout
from qwen_jax.config import QuantizationConfig

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())

Change = dict[str, Any] | Callable[[dict[str, Any]], Any] | None


def weights_file(folder: Path) -> Path:
    """The folder's only safetensors file."""
    (file,) = folder.glob("*.safetensors")
    return file


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a golden folder, read by safetensors itself."""
    return load_file(weights_file(folder))


def edited(
    case: str,
    target: Path,
    kind: str = "quantized",
    *,
    config: Change = None,
    quantize: Change = None,
    tensors: Change = None,
) -> Path:
    """Copies a golden folder into `target`/checkpoint and applies changes.

    A change is a dictionary of new values (None removes a key) or a function that changes its argument in place.
    `quantize` is applied to quantize_config.json and to config.json's section, `tensors` to the arrays.
    """
    folder = target / "checkpoint"
    shutil.copytree(GOLDEN / case / kind, folder)

    def apply(change: Change, content: dict[str, Any]) -> dict[str, Any]:
        if callable(change):
            change(content)
        for key, value in change.items() if isinstance(change, dict) else ():
            content[key] = value
            if value is None:
                del content[key]
        return content

    path = folder / "config.json"
    raw = apply(config, json.loads(path.read_text()))
    if quantize is not None:
        apply(quantize, raw["quantization_config"])
        alone = folder / "quantize_config.json"
        alone.write_text(json.dumps(apply(quantize, json.loads(alone.read_text()))))
    path.write_text(json.dumps(raw))
    if tensors is not None:
        file = weights_file(folder)
        content = apply(tensors, load_file(file))
        save_file(
            {name: np.ascontiguousarray(array) for name, array in content.items()}, file, metadata={"format": "pt"}
        )
    return folder


def rounded(case: str, target: Path, quantization: dict[str, Any], config: Change = None) -> Path:
    """A golden case's source rounded to nearest by the given settings, written as `target`/rounded."""
    source = edited(case, target, "source", config=config)
    checkpoint, settings = Checkpoint(source), QuantizationConfig.from_dict(quantization)

    def parameters():
        for path in checkpoint.paths:
            if path.endswith(".scale"):
                yield path, checkpoint.read_vector(path)
                continue
            module, chosen = checkpoint.read(path), settings.for_module(checkpoint.module_name(path))
            if chosen is not None:
                weight = round_to_nearest(module.weight.data.T, chosen.bits, chosen.group_size, chosen.sym is not False)
                module = Module(weight, module.bias)
            yield path, module

    raw = json.loads((source / "config.json").read_text())
    write(target / "rounded", parameters(), config=raw, quantization=quantization, source=source)
    return target / "rounded"


def round_to_nearest(weight_IO: np.ndarray, bits: int, group_size: int = -1, sym: bool = True):
    """The nearest quantized tensor, float16 scales."""
    inputs = len(weight_IO)
    group_size = inputs if group_size == -1 else group_size
    top, starts = 2**bits - 1, range(0, inputs, group_size)
    low_GO = np.stack([weight_IO[i : i + group_size].min(0) for i in starts]).clip(max=0)
    high_GO = np.stack([weight_IO[i : i + group_size].max(0) for i in starts]).clip(min=0)
    if sym:
        high_GO = np.maximum(high_GO, -low_GO)
        low_GO = -high_GO
    scales_GO = ((high_GO - low_GO) / top + 1e-6).astype(np.float16)
    zeros_GO = np.full(low_GO.shape, 2 ** (bits - 1)) if sym else np.rint(-low_GO / scales_GO).clip(0, top).astype(int)
    group_I = np.arange(inputs) // group_size
    q_IO = (np.rint(weight_IO / scales_GO[group_I]) + zeros_GO[group_I]).clip(0, top).astype(np.uint8)
    return layout.from_integers(q_IO, scales_GO, None if sym else zeros_GO, bits=bits, group_size=group_size)

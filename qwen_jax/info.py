"""What a checkpoint is and how it would run, told without loading a weight."""

import dataclasses
from pathlib import Path
from typing import Any

import pallas_kernels.kv_attention.op as kv_attention
import pallas_kernels.quantized_matmul as quantized_matmul
from converters.huggingface import Checkpoint, ModuleSpec
from pallas_kernels.quantized_matmul.op import default_chip
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from qwen_jax.checkpoint_store import find
from qwen_jax.config import ModelConfig
from qwen_jax.kv_cache import bytes_per_token
from qwen_jax.loading import FUSED, CheckpointWeights

PREFILL_ROWS = 512  # the prompt length that the prefill kernels are asked for
ZERO_CONVENTIONS = {"v1": "stored minus 1", "v2": "stored as they are"}


def describe(name: str | Path, *, chip: str | None = None, kernels: str = "auto", dtype: str = "bfloat16") -> dict:
    """Architecture, quantization, bytes, and the kernel of each operation, ready for JSON.

    Args:
        name: a Hugging Face folder or a Hub id.
        chip: `device_kind` to choose kernels for, as "NVIDIA H100 80GB HBM3"; None for JAX's default device.
        kernels: as `QwenForCausalLM.from_pretrained`.
        dtype: of activations.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ValueError: a named kernel cannot run here.
    """
    folder = find(name)
    checkpoint = Checkpoint(folder)
    chip = default_chip() if chip is None else chip
    config = checkpoint.config
    return {
        "folder": str(folder),
        "architecture": dataclasses.asdict(config),
        "quantization": _quantization(checkpoint),
        "bytes": _bytes(checkpoint),
        "kv_bytes_per_token": {
            "16-bit": bytes_per_token(config, "bfloat16", False),
            "8-bit": bytes_per_token(config, "bfloat16", True),
        },
        "kernels": {"chip": chip, "dtype": dtype, "operations": _kernels(checkpoint, chip, kernels, dtype)},
    }


def _modules(checkpoint: Checkpoint) -> dict[str, ModuleSpec]:
    return {path: checkpoint.spec(path) for path in checkpoint.paths if not path.endswith(".scale")}


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    config = checkpoint.quantization
    if config is None:
        return None
    specs = _modules(checkpoint)
    packed = {path: spec for path, spec in specs.items() if spec.kind == "quantized"}
    exceptions = []
    for path, spec in specs.items():
        size = (spec.bits, spec.group_size) if spec.kind == "quantized" else None
        usual = (config.bits, spec.in_features if config.group_size == -1 else min(config.group_size, spec.in_features))
        if size is None and (path.startswith("layers.") or config.lm_head):
            exceptions.append(f"{path}: {spec.dtype}")
        elif size is not None and size != usual:
            exceptions.append(f"{path}: {spec.bits} bits, groups of {spec.group_size}")
    return {
        "method": config.method,
        "format": config.checkpoint_format,
        "bits": config.bits,
        "group_size": config.group_size,
        "modules": len(packed),
        "asymmetric_modules": sum(spec.has_zeros for spec in packed.values()),
        "act_order_modules": sum(spec.has_permutation for spec in packed.values()),
        "zero_points": sorted({ZERO_CONVENTIONS[spec.zero_convention or "v2"] for spec in packed.values()}),
        "exceptions": exceptions,
        "head": "tied" if checkpoint.config.tie_word_embeddings else specs["lm_head"].kind,
    }


def _bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes in the files by part, and what all of it would take in 16 bits."""
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "lm_head": 0}
    in_16_bits = 0
    for path in checkpoint.paths:
        nbytes = checkpoint.nbytes(path)
        if path.endswith(".scale"):
            parts["norms"] += nbytes
            in_16_bits += nbytes
        else:
            parts[path.split(".")[2] if path.startswith("layers.") else path] += nbytes
            spec = checkpoint.spec(path)
            in_16_bits += 2 * spec.in_features * spec.out_features
    return parts | {"total": sum(parts.values()), "total_in_16_bits": in_16_bits}


def _kernels(checkpoint: Checkpoint, chip: str, kernels: str, dtype: str) -> list[dict[str, str]]:
    """Each distinct matrix, fused and stacked as at load, and attention, with the kernels that run them."""
    weights = CheckpointWeights(checkpoint, dtype=dtype, kernels=kernels)
    matrices = []  # (what it is, its spec, length of its stack)
    for layers in weights.blocks():
        first = f"layers.{layers.start}"
        for paths in [*_fused_paths(weights, layers.start), ("attention.output",), ("mlp.down",)]:
            spec = checkpoint.spec(f"{first}.{paths[0]}")
            width = sum(checkpoint.spec(f"{first}.{path}").out_features for path in paths)
            label = " + ".join(path.split(".")[1] for path in paths)
            matrices.append((label, dataclasses.replace(spec, out_features=width), len(layers)))
    head = "embedding" if checkpoint.config.tie_word_embeddings else "lm_head"
    matrices.append(("lm_head", checkpoint.spec(head), 0))
    labels: dict[tuple[str, ...], list[str]] = {}
    for label, spec, layers in matrices:
        labels.setdefault(_choices(spec, layers, chip, kernels, dtype), []).append(label)
    names = ("weight", "decode", "prefill")
    operations = [
        {"operation": ", ".join(dict.fromkeys(same)), **dict(zip(names, choices, strict=True))}
        for choices, same in labels.items()
    ]
    return [*operations, *_attention_choices(checkpoint.config, chip, kernels, dtype)]


def _choices(spec: ModuleSpec, layers: int, chip: str, kernels: str, dtype: str) -> tuple[str, ...]:
    weight = f"[{spec.in_features}, {spec.out_features}]"
    if spec.kind == "dense":
        return f"{weight} {spec.dtype}", "xla", "xla"
    shape = MatmulShape(
        rows=1,
        in_features=spec.in_features,
        out_features=spec.out_features,
        bits=spec.bits or 0,
        group_size=spec.group_size or 0,
        zeros=spec.has_zeros,
        permutation=spec.has_permutation,
        dtype=dtype,
        layers=layers,
    )
    kernel = quantized_matmul.KERNELS[quantized_matmul.choose(shape, chip, kernels).name]
    shape = dataclasses.replace(shape, layout=getattr(kernel, "LAYOUT", "gptq"))  # what `prepack` makes of it
    prefill = dataclasses.replace(shape, rows=PREFILL_ROWS)
    return (
        f"{weight} {spec.bits} bits, groups of {spec.group_size}",
        str(quantized_matmul.choose(shape, chip, kernels)),
        str(quantized_matmul.choose(prefill, chip, kernels)),
    )


def _attention_choices(config: ModelConfig, chip: str, kernels: str, dtype: str) -> list[dict[str, str]]:
    rows = []
    for quantized in (False, True):
        shape = kv_attention.AttentionShape(
            1, config.num_heads, config.num_kv_heads, config.head_dim, PREFILL_ROWS, quantized, dtype
        )
        choice = kv_attention.choose(shape, chip, kernels)
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in choice.refusals)
        rows.append(
            {
                "operation": f"attention, {'8-bit' if quantized else dtype} cache",
                "weight": "",
                "decode": choice.name + (f" ({reasons})" if reasons else ""),
                "prefill": "xla",
            }
        )
    return rows


def _fused_paths(weights: CheckpointWeights, layer: int) -> list[tuple[str, ...]]:
    """Paths below `layer` of the projections that share one matrix, as the checkpoint holds them."""
    paths = []
    for path, outputs in FUSED.items():
        for names in weights._groups(layer, path, outputs):
            stored = weights._stored(path) if len(weights._stored(path)) == 1 else names
            paths.append(tuple(f"{path}.{name}" for name in stored))
    return paths

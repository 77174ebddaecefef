"""What a checkpoint is and how it would run, told without loading a weight."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import pallas_kernels.kv_attention.op as kv_attention
import pallas_kernels.quantized_matmul as quantized_matmul
from converters import orbax
from converters.huggingface import Checkpoint
from pallas_kernels import decode_step
from pallas_kernels.chip import default_chip
from pallas_kernels.quantized_matmul.layout_mosaic_gpu import LAYOUT
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from qwen_jax.checkpoint_store import find
from qwen_jax.config import ModelConfig, QuantizationConfig
from qwen_jax.kv_cache import bytes_per_token
from qwen_jax.loading import FUSED, CheckpointWeights

PREFILL_ROWS = 512  # the prompt length that the prefill kernels are asked for
ZERO_CONVENTIONS = {"v1": "stored minus 1", "v2": "stored as they are"}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix as the model holds it: a stack over alike layers, perhaps of several projections side by side.

    Attributes:
        label: "query + key + value", "lm_head", …
        in_features: of one layer's matrix.
        out_features: of one layer's matrix.
        dtype: of the weight, or of the scales.
        layers: length of the stack, 0 for a single matrix.
        bits: None for a float matrix.
        group_size: inputs that share a scale; None for a float matrix.
        zeros: whether zero-points are stored.
        permutation: whether it has act-order.
    """

    label: str
    in_features: int
    out_features: int
    dtype: str
    layers: int = 0
    bits: int | None = None
    group_size: int | None = None
    zeros: bool = False
    permutation: bool = False


def describe(name: str | Path, *, chip: str | None = None, kernels: str = "auto", dtype: str = "bfloat16") -> dict:
    """Architecture, quantization, bytes, and the kernel of each operation, ready for JSON.

    Args:
        name: a Hugging Face folder, one written by `convert`, or a Hub id.
        chip: `device_kind` to choose kernels for, as "NVIDIA H100 80GB HBM3"; None for JAX's default device.
        kernels: as `QwenForCausalLM.from_pretrained`.
        dtype: of activations.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ValueError: a named kernel cannot run here.
    """
    folder = find(name)
    chip = default_chip() if chip is None else chip
    read = _converted if orbax.is_checkpoint(folder) else _huggingface
    config, quantization, nbytes, matrices = read(folder, dtype)
    parameters = sum(m.in_features * m.out_features * (m.layers or 1) for m in matrices)
    if config.tie_word_embeddings:  # listed twice, as lookup and as head
        parameters -= config.vocab_size * config.hidden_size
    return {
        "folder": str(folder),
        "architecture": dataclasses.asdict(config),
        "quantization": quantization,
        "bytes": nbytes | {"total": sum(nbytes.values()), "total_in_16_bits": 2 * parameters + nbytes["norms"]},
        "kv_bytes_per_token": {
            "16-bit": bytes_per_token(config, "bfloat16", False),
            "8-bit": bytes_per_token(config, "bfloat16", True),
        },
        "kernels": {
            "chip": chip,
            "dtype": dtype,
            "operations": _matmuls(matrices, chip, kernels, dtype) + _attention(config, chip, kernels, dtype),
            "decode_step": _decode_step(config, matrices, chip, kernels, dtype),
        },
    }


def _part(path: str) -> str:
    """The heading under which a parameter's bytes are counted."""
    if "norm" in path:
        return "norms"
    return next((part for part in ("attention", "mlp") if f".{part}" in path), path.split(".")[0])


def _count(sizes: list[tuple[str, int]]) -> dict[str, int]:
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norms": 0, "lm_head": 0}
    for path, nbytes in sizes:
        parts[_part(path)] += nbytes
    return parts


def _huggingface(folder: Path, dtype: str):
    checkpoint = Checkpoint(folder)
    weights = CheckpointWeights(checkpoint, dtype=dtype)

    def matrix(label: str, paths: list[str], layers: int) -> Matrix:
        specs = [checkpoint.spec(path) for path in paths]
        first, width = specs[0], sum(spec.out_features for spec in specs)
        quantized = (first.bits, first.group_size, first.has_zeros, first.has_permutation)
        return Matrix(label, first.in_features, width, first.dtype, layers, *quantized)

    matrices = [matrix("embedding lookup", ["embedding"], 0)]
    for layers in weights.blocks():
        for names in [*_fused_paths(weights, layers.start), ("attention.output",), ("mlp.down",)]:
            label = " + ".join(name.split(".")[1] for name in names)
            matrices.append(matrix(label, [f"layers.{layers.start}.{name}" for name in names], len(layers)))
    matrices.append(matrix("lm_head", ["embedding" if checkpoint.config.tie_word_embeddings else "lm_head"], 0))
    nbytes = _count([(path, checkpoint.nbytes(path)) for path in checkpoint.paths])
    return checkpoint.config, _quantization(checkpoint), nbytes, matrices


def _fused_paths(weights: CheckpointWeights, layer: int) -> list[tuple[str, ...]]:
    """Paths below `layer` of the projections that share one matrix, as the checkpoint holds them."""
    return [tuple(f"{path}.{name}" for name in stored) for path in FUSED for _, stored in weights.matrices(layer, path)]


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    config = checkpoint.quantization
    if config is None:
        return None
    specs = {path: checkpoint.spec(path) for path in checkpoint.paths if not path.endswith(".scale")}
    packed = {path: spec for path, spec in specs.items() if spec.kind == "quantized"}
    exceptions = []
    for path, spec in specs.items():
        usual = (config.bits, spec.in_features if config.group_size == -1 else min(config.group_size, spec.in_features))
        if spec.kind == "dense" and (path.startswith("layers.") or (path == "lm_head" and config.lm_head)):
            exceptions.append(f"{path}: {spec.dtype}")
        elif spec.kind == "quantized" and (spec.bits, spec.group_size) != usual:
            exceptions.append(f"{path}: {spec.bits} bits, groups of {spec.group_size}")
    return {
        **_settings(config),
        "modules": len(packed),
        "asymmetric_modules": sum(spec.has_zeros for spec in packed.values()),
        "act_order_modules": sum(spec.has_permutation for spec in packed.values()),
        "zero_points": sorted({ZERO_CONVENTIONS[spec.zero_convention or "v2"] for spec in packed.values()}),
        "exceptions": exceptions,
    }


def _settings(config: QuantizationConfig) -> dict[str, Any]:
    return {
        "method": config.method,
        "format": config.checkpoint_format,
        "bits": config.bits,
        "group_size": config.group_size,
    }


def _converted(folder: Path, dtype: str):
    """The same of a folder that `convert` wrote, from its manifest."""
    del dtype
    config, settings = ModelConfig.from_folder(folder), QuantizationConfig.from_folder(folder)
    arrays, metadata = orbax.describe(folder)
    matrices = []
    for name, facts in metadata["modules"].items():
        if "kind" not in facts:
            continue
        path = name.split(".", 2)[-1] if name.startswith("layers.") else name
        path, _, number = path.rpartition(".") if path[-1].isdigit() else (path, "", "")
        widths = metadata["modules"].get(name.rpartition(".")[0], {}).get("sizes")
        label = path.split(".")[-1]
        if number and widths:
            before = sum(len(part) for part in widths[: int(number)])
            label = " + ".join(FUSED[path][before : before + len(widths[int(number)])])
        if facts["kind"] == "quantized":
            scales = arrays[f"{name}.scales"]
            quantized = (facts["bits"], facts["group_size"], f"{name}.zeros" in arrays, f"{name}.permutation" in arrays)
        else:
            scales, quantized = arrays[f"{name}.data"], ()
        layers = scales.shape[0] if name.startswith("layers.") else 0
        transposed = facts.get("layout") == "transposed"
        width = scales.shape[-2] if transposed else scales.shape[-1]
        matrices.append(Matrix(label, facts["in_features"], width, str(scales.dtype), layers, *quantized))
    lookup = next(m for m in matrices if m.label == "embedding")
    if config.tie_word_embeddings:
        matrices.append(dataclasses.replace(lookup, label="lm_head"))
    nbytes = _count([(name, math.prod(a.shape) * jnp.dtype(a.dtype).itemsize) for name, a in arrays.items()])
    packed = [m for m in matrices if m.bits]
    quantization = settings and {
        **_settings(settings),
        "modules": sum(m.layers or 1 for m in packed),
        "asymmetric_modules": sum((m.layers or 1) * m.zeros for m in packed),
        "act_order_modules": sum((m.layers or 1) * m.permutation for m in packed),
        "zero_points": ["converted: stored as they are"],
        "exceptions": [f"{m.label}: {m.dtype}" for m in matrices if m.layers and not m.bits],
    }
    return config, quantization, nbytes, matrices


def _matmuls(matrices: list[Matrix], chip: str, kernels: str, dtype: str) -> list[dict[str, str]]:
    """Each distinct matrix with the kernels that multiply by it."""
    labels: dict[tuple[str, str, str], list[str]] = {}
    for matrix in matrices:
        if matrix.label not in ("embedding", "embedding lookup"):
            labels.setdefault(_choices(matrix, chip, kernels, dtype), []).append(matrix.label)
    return [
        {"operation": ", ".join(dict.fromkeys(same)), "weight": weight, "decode": decode, "prefill": prefill}
        for (weight, decode, prefill), same in labels.items()
    ]


def _choices(matrix: Matrix, chip: str, kernels: str, dtype: str) -> tuple[str, str, str]:
    weight = f"[{matrix.in_features}, {matrix.out_features}]"
    if matrix.bits is None or matrix.group_size is None:
        return f"{weight} {matrix.dtype}", "xla", "xla"
    shape = MatmulShape(
        rows=1,
        in_features=matrix.in_features,
        out_features=matrix.out_features,
        bits=matrix.bits,
        group_size=matrix.group_size,
        zeros=matrix.zeros,
        permutation=matrix.permutation,
        dtype=dtype,
        layers=matrix.layers,
    )
    kernel = quantized_matmul.KERNELS[quantized_matmul.choose(shape, chip, kernels).name]
    shape = dataclasses.replace(shape, layout=getattr(kernel, "LAYOUT", "gptq"))  # what `prepack` makes of it
    prefill = dataclasses.replace(shape, rows=PREFILL_ROWS)
    return (
        f"{weight} {matrix.bits} bits, groups of {matrix.group_size}",
        str(quantized_matmul.choose(shape, chip, kernels)),
        str(quantized_matmul.choose(prefill, chip, kernels)),
    )


def _attention(config: ModelConfig, chip: str, kernels: str, dtype: str) -> list[dict[str, str]]:
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


def _decode_step(config: ModelConfig, matrices: list[Matrix], chip: str, kernels: str, dtype: str) -> str:
    """How the layers of a decode step run: in one launch for so many rows, or a kernel at a time."""
    reason = None if kernels in ("auto", "mosaic_gpu") else f"kernels={kernels!r} is asked for"
    stacks = [m for m in matrices if m.layers]
    if reason is None and chip not in decode_step.MULTIPROCESSORS:
        reason = f"it is written for {', '.join(decode_step.MULTIPROCESSORS)}"
    if reason is None and (len(stacks) % 4 or any(m.bits is None for m in stacks)):
        reason = "layers are not four quantized matrices each"
    if reason is None:
        refusals = {rows: _refusal(config, stacks, chip, dtype, rows) for rows in range(1, decode_step.MOST_ROWS + 1)}
        most = max((rows for rows, refusal in refusals.items() if refusal is None), default=0)
        if most:
            return f"all layers in one launch up to {most} rows, a kernel at a time for more"
        reason = refusals[1]
    return f"a kernel at a time (not in one launch: {reason})"


def _refusal(config: ModelConfig, stacks: list[Matrix], chip: str, dtype: str, rows: int) -> str | None:
    """Why one launch cannot take so many rows; None where it can."""
    for start in range(0, len(stacks), 4):
        block = zip(decode_step.MATRICES, stacks[start : start + 4], strict=True)
        shape = decode_step.DecodeShape(
            batch=rows,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            layers=stacks[start].layers,
            length=PREFILL_ROWS,
            cache=config.num_layers * rows * config.num_kv_heads * PREFILL_ROWS,
            quantized=True,
            dtype=dtype,
            norm_dtype="float32",
            biased=config.attention_bias,
            matrices=tuple(
                (name, m.bits or 16, m.group_size or 0, "bfloat16", not m.zeros, m.permutation, LAYOUT)
                for name, m in block
            ),
        )
        if (reason := decode_step.unsupported(shape, chip)) is not None:
            return reason
    return None

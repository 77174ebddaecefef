"""LoRA adapters in PEFT's own files: `adapter_config.json` and `adapter_model.safetensors`, read and written."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from converters import names
from converters.folders import complete_or_absent
from converters.safetensors_files import StoredTensor, header
from qwen_jax.config import ModelConfig
from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = ("F32", "F16", "BF16")

# Keys that are read here, or that say nothing about what a finished adapter computes. Any other must be empty.
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"}
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
SELECTION = ("exclude_modules", "layers_pattern", "layers_to_transform")  # of the targets; the tensors tell as well
# Ways to begin that leave the base model's weights other than they were: the adapter alone is not the difference.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """W + scale · b · a for one module.

    Attributes:
        a_RI: float32 [rank, in].
        b_OR: float32 [out, rank].
        scale: alpha / rank, with rsLoRA alpha / √rank.
    """

    a_RI: np.ndarray
    b_OR: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What fine-tuning has added to a model.

    Attributes:
        modules: our path ("layers.0.attention.query") → its low-rank term.
        saved: our path ("lm_head", "embedding", "final_norm.scale") → an array that stands in place of the base's, in
            the files' orientation ([out, in]; the embedding [V, D]): PEFT's `modules_to_save`.
        settings: adapter_config.json.
    """

    modules: Mapping[str, LowRank]
    saved: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]


def read(folder: str | Path, config: ModelConfig) -> Adapter:
    """Reads a LoRA adapter of a model of this architecture; every tensor must have a place in it.

    Raises:
        CheckpointError: missing or damaged files, another method than LoRA, a setting that changes the arithmetic and
            is not supported, tensors of another model.
    """
    folder = Path(folder)
    settings = _settings(folder)
    tensors = _tensors(folder)
    shapes = names.modules(config) | {"lm_head": (config.hidden_size, config.vocab_size)}
    vectors = names.vectors(config)
    halves: dict[str, dict[str, StoredTensor]] = {}
    saved: dict[str, StoredTensor] = {}
    homeless = []
    for name, tensor in tensors.items():
        base = name.removeprefix(PREFIX).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", base)
        found = names.ours(config.family, f"{match[1]}.weight" if match else base)
        if not name.startswith(PREFIX) or found is None or found[1] != "weight":
            homeless.append(name)
        elif match and found[0].startswith("layers.") and found[0] in shapes:
            halves.setdefault(found[0], {})[match[2]] = tensor
        elif not match and (found[0] in vectors or found[0] in ("embedding", "lm_head")):
            saved[found[0]] = tensor
        else:
            homeless.append(name)
    if homeless:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {len(homeless)} tensors without a place (first {homeless[0]}); expected low-rank "
            f"matrices of the projections of a {config.family} model of {config.num_layers} layers, and whole "
            "embeddings, heads and norms. The adapter belongs to another model, or trains what is not supported."
        )
    modules = {}
    for path, parts in halves.items():
        modules[path] = _low_rank(folder, names.theirs(config.family, path), parts, shapes[path], settings)
    arrays = {}
    for path, tensor in saved.items():
        shape = (vectors[path],) if path in vectors else shapes[path][::-1]
        _check(folder, tensor, shape)
        arrays[path] = tensor.read().astype(np.float32)
    if not modules and not arrays:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no tensors, expected those of an adapter.")
    return Adapter(modules, arrays, settings)


def write(
    folder: str | Path,
    adapter: Adapter,
    config: ModelConfig,
    *,
    base_model: str,
    targets: list[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    selection: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter as PEFT writes it; PEFT loads it.

    Args:
        folder: appears complete or not at all.
        adapter: `settings` of it are not used.
        config: of the base model.
        base_model: its name or folder, for adapter_config.json.
        targets: names of the adapted modules, each the end of a full name, e.g. "q_proj".
        rank: of every module that no pattern names.
        alpha: likewise.
        dropout: that it was trained with; means nothing afterwards.
        rslora: whether the scale is alpha / √rank.
        rank_pattern: the end of a module's name, or a regular expression for it → its rank; the first that fits.
        alpha_pattern: likewise its alpha.
        selection: which of the targets have a term, by the keys of `SELECTION`; None for all.
        overwrite: replace a folder that is there.

    Raises:
        ValueError: a module has another rank or scale than these settings give it.
    """
    with complete_or_absent(folder, overwrite) as temporary:
        write_files(
            temporary,
            adapter,
            config,
            base_model=base_model,
            targets=targets,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            selection=selection,
        )


def write_files(folder: Path, adapter: Adapter, config: ModelConfig, **settings) -> None:
    """The two files of `write`, each replaced in one move, in a folder that may hold other things."""
    ranks, alphas = (dict(settings.get(f"{what}_pattern") or {}) for what in ("rank", "alpha"))
    tensors: dict[str, np.ndarray] = {}
    for path, term in adapter.modules.items():
        name = names.theirs(config.family, path)
        rank, alpha = _pattern(ranks, name, settings["rank"]), _pattern(alphas, name, settings["alpha"])
        wanted = scale(alpha, rank, settings["rslora"])
        if len(term.a_RI) != rank or not math.isclose(term.scale, wanted, rel_tol=1e-6):
            raise ValueError(f"{path}: rank {len(term.a_RI)} and scale {term.scale}, expected {rank} and {wanted}.")
        name = f"{PREFIX}{name}"
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(term.a_RI, np.float32)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(term.b_OR, np.float32)
    for path, array in adapter.saved.items():
        name = names.theirs(config.family, path)  # PEFT leaves "modules_to_save.default" out of the file
        tensors[f"{PREFIX}{name}.weight"] = np.ascontiguousarray(array, np.float32)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings["base_model"],
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "use_rslora": settings["rslora"],
        "use_dora": False,
        "target_modules": sorted(settings["targets"]),
        "modules_to_save": _saved_names(adapter, config) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        **{key: (settings.get("selection") or {}).get(key) for key in SELECTION},
    }
    save_file(tensors, folder / f".{WEIGHTS}.new", metadata={"format": "pt"})
    (folder / f".{CONFIG}.new").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        (folder / f".{name}.new").replace(folder / name)


def scale(alpha: float, rank: int, rslora: bool) -> float:
    """What the low-rank product is multiplied by: alpha / rank, with rsLoRA (arXiv:2312.03732) alpha / √rank."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def chosen(config: ModelConfig, targets: list[str]) -> list[str]:
    """Our paths of the projections whose name in the family's files ends with one of `targets`, as PEFT matches.

    Raises:
        ValueError: for a target that no projection of the layers has; lists those there are.
    """
    paths = {path: names.theirs(config.family, path) for path in names.modules(config) if path.startswith("layers.")}
    used, found = set(), []
    for path, name in paths.items():
        matching = [target for target in targets if name == target or name.endswith(f".{target}")]
        used |= set(matching)
        if matching:
            found.append(path)
    if unknown := [target for target in targets if target not in used]:
        raise ValueError(
            f"target modules: {unknown[0]!r} is no projection of a {config.family} model, expected some of "
            f"{target_names(config)}."
        )
    return found


def target_names(config: ModelConfig) -> list[str]:
    """The projections of a layer by the family's own names, as short as they stay unique: "q_proj", "attn.c_proj"."""
    first = [path for path in names.modules(config) if path.startswith("layers.0.")]
    full = [names.theirs(config.family, path) for path in first]
    last = [name.rpartition(".")[2] for name in full]
    return [
        end if last.count(end) == 1 else ".".join(name.split(".")[-2:]) for name, end in zip(full, last, strict=True)
    ]


def savable(config: ModelConfig, wanted: list[str]) -> list[str]:
    """Our paths of embedding, head and norms whose full name ends with one of `wanted`, as PEFT's modules_to_save.

    "lm_head" is one module, "input_layernorm" one of each layer, "norm" every norm, "model.norm" the last alone.

    Raises:
        ValueError: for a name that none of these ends with.
    """
    full = {path: names.theirs(config.family, path) for path in ("embedding", "lm_head", *names.vectors(config))}
    for name in wanted:
        if not any(each.endswith(name) for each in full.values()):
            ends = sorted({each.rpartition(".")[2] for each in full.values()})
            raise ValueError(
                f"modules_to_save: {name!r} is the end of none of {ends}; the projections learn through target modules."
            )
    return [path for path, each in full.items() if each.endswith(tuple(wanted))]


def _saved_names(adapter: Adapter, config: ModelConfig) -> list[str]:
    """`modules_to_save` with which PEFT, which compares ends of names, finds what is in the file and no more."""
    full = sorted(names.theirs(config.family, path) for path in adapter.saved)
    short = sorted({name.rpartition(".")[2] for name in full})
    return short if len(savable(config, short)) == len(full) else full


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}, expected a folder that PEFT or `qwen-jax finetune` wrote.")
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {settings.get('peft_type')!r}, expected 'LORA'.")
    for key, value in settings.items():
        if key not in READ | NEUTRAL and value:
            if key == "megatron_config" or (isinstance(value, dict) and not any(value.values())):
                continue
            raise CheckpointError(
                f"{path}: {key} is {value!r:.60}, which is not supported; expected an adapter without."
            )
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {settings['bias']!r}, expected 'none': trained biases are not read.")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which changes the base model's weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA."
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float) or settings[key] <= 0:
            raise CheckpointError(f"{path}: {key} is {settings.get(key)!r}, expected a positive number.")
    return settings


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise CheckpointError(
                f"{pickled}: pickled weights are not read, because unpickling can run any code the file contains; save "
                "the adapter again with a PEFT that writes safetensors."
            )
        raise CheckpointError(f"{folder}: has no {WEIGHTS}, expected the adapter's tensors.")
    return header(path)


def _low_rank(folder: Path, name: str, parts: dict[str, StoredTensor], shape: tuple[int, int], settings) -> LowRank:
    if set(parts) != {"A", "B"}:
        raise CheckpointError(f"{folder / WEIGHTS}: {name} has lora_{min(parts)} alone, expected lora_A and lora_B.")
    rank = _pattern(settings.get("rank_pattern"), name, settings["r"])
    alpha = _pattern(settings.get("alpha_pattern"), name, settings["lora_alpha"])
    _check(folder, parts["A"], (rank, shape[0]))
    _check(folder, parts["B"], (shape[1], rank))
    a_RI, b_OR = (parts[half].read().astype(np.float32) for half in "AB")
    return LowRank(a_RI, b_OR, scale(alpha, rank, bool(settings.get("use_rslora"))))


def _pattern(patterns: Mapping[str, Any] | None, name: str, default):
    """PEFT's rule: the first pattern that is the end of the name, or all of it, as a regular expression."""
    return next(_matches(patterns or {}, name), default)


def _matches(patterns: Mapping[str, Any], name: str) -> Iterator[Any]:
    return (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))


def _check(folder: Path, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {tensor.name}: {tensor.dtype} {list(tensor.shape)}, expected floats {list(shape)} by "
            f"{CONFIG} and the base model."
        )

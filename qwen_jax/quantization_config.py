"""`QuantizationConfig`: how a checkpoint's linear modules are quantized, read from the checkpoint's own JSON.

GPTQ settings lie in quantize_config.json (AutoGPTQ), in config.json under `quantization_config` (transformers), or in
both; compressed-tensors settings in config.json. Where two places disagree about the tensors, that is an error.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import CheckpointError
from qwen_jax.json_keys import JsonKeys, read_json

logger = logging.getLogger("qwen_jax")

BITS = (2, 3, 4, 8)
PACKED_BITS = (2, 4, 8)  # compressed-tensors has packed 3 bits in two ways that a file does not tell apart
EMBEDDINGS = ("embed_tokens", "wte")
GPTQ_FORMATS = ("gptq", "gptq_v2", "gptq_p")

# How the file was made, not what is in it; and other software's run-time switches.
MEANINGLESS = frozenset(
    """
    quant_method method damp_percent damp_auto_increment static_groups true_sequential model_name_or_path
    model_file_base_name meta dataset tokenizer batch_size pad_token_id model_seqlen block_name_to_quantize
    module_name_preceding_first_block use_cuda_fp16 use_exllama disable_exllama exllama_config max_input_length
    cache_block_outputs backend device parallel hyb_act mse autogptq_version autoround_version act_group_aware
    enable_quanted_input enable_minmax_tuning seqlen scale_dtype lr minmax_lr gradient_accumulate_steps iters amp
    nsamples low_gpu_mem_usage low_cpu_mem_usage to_quant_block_names provider
    global_compression_ratio quantization_status version sparsity_config transform_config moe_sparsity_config
    """.split()
)


@dataclasses.dataclass(frozen=True)
class ModuleSettings:
    """How one module is stored.

    Attributes:
        bits: width of an integer.
        group_size: inputs that share a scale; −1 for all of them.
        sym: whether every zero-point is 2^(bits − 1); None if the file does not say (its zero-points do).
        desc_act: whether the settings speak of act-order; None if they do not (`g_idx` decides anyway).
        rule: where these settings stand, for error messages.
    """

    bits: int
    group_size: int
    sym: bool | None
    desc_act: bool | None
    rule: str


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A compressed-tensors config group: the modules that `targets` names and their settings."""

    targets: tuple[str, ...]
    settings: ModuleSettings


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """A checkpoint's quantization settings.

    Attributes:
        method: "gptq" or "compressed-tensors".
        bits: of modules without a rule of their own (compressed-tensors: of the first config group).
        group_size: inputs that share a scale; −1 for all of them.
        sym: whether zero-points are all 2^(bits − 1); None if the file does not say.
        desc_act: the file's word on act-order; None if it has none. The tensors decide.
        checkpoint_format: "gptq" (v1: zero-points stored minus 1), "gptq_v2", "gptq_p", or "pack-quantized".
        lm_head: whether the head is quantized (GPTQ).
        dynamic: rules (regular expression with "-:" or "+:" or no prefix, settings), the first that matches decides.
        modules_in_block_to_quantize: names inside a layer that are quantized, the others float; None for all.
        modules_to_not_convert: modules, or parts of their names, left in float (compressed-tensors: `ignore`).
        schemes: compressed-tensors config groups.
        quantizer: what wrote the file, e.g. "gptqmodel:7.7.0"; "" if it does not say.
        raw: the JSON settings, for writing the checkpoint again.
        where: the file they came from.
    """

    method: str
    bits: int
    group_size: int
    sym: bool | None = None
    desc_act: bool | None = None
    checkpoint_format: str = "gptq"
    lm_head: bool = False
    dynamic: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    modules_in_block_to_quantize: tuple[str, ...] | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    schemes: tuple[Scheme, ...] = ()
    quantizer: str = ""
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, hash=False)
    where: str = dataclasses.field(default="quantize_config.json", compare=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "QuantizationConfig | None":
        """The settings of a checkpoint folder, None if it has none.

        Raises:
            CheckpointError: for an unsupported method or format, bad values, or two files that disagree.
        """
        folder = Path(folder)
        alone, inside = folder / "quantize_config.json", folder / "config.json"
        raw_inside = read_json(inside)
        section = raw_inside.get("quantization_config") or raw_inside.get("compression_config")
        if not alone.is_file():
            return None if section is None else cls.from_dict(section, f"{inside}: quantization_config")
        config = cls.from_dict(read_json(alone), str(alone))
        if section is not None:
            other = cls.from_dict(section, f"{inside}: quantization_config")
            _refuse_disagreement(config, other)
            if len(other.raw) > len(config.raw):
                return other
        return config

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "quantize_config.json") -> "QuantizationConfig":
        """The same from parsed JSON; `where` begins every error message."""
        keys = JsonKeys(raw, where)
        method = keys.take(str, "quant_method", "method", default="gptq")
        keys.ignore(MEANINGLESS)
        readers = {"gptq": _gptq, "compressed-tensors": _compressed_tensors}
        if method not in readers:
            raise CheckpointError(f"{where}: quant_method is {method!r}, expected one of {', '.join(readers)}.")
        fields = readers[method](keys)
        keys.refuse_unread("it may change what the weights mean, so it is not ignored. If it does not, remove it.")
        return cls(method=method, raw=dict(raw), where=where, **fields)

    def for_module(self, name: str) -> ModuleSettings | None:
        """The settings of a module by its full name in the file ("model.layers.0.mlp.up_proj"); None if it is float."""
        if self.method == "compressed-tensors":
            return self._from_schemes(name)
        if any(f".{part}." in f".{name}." for part in self.modules_to_not_convert):
            return None
        in_a_layer = any(part.isdigit() for part in name.split("."))
        if not in_a_layer and not (name.endswith("lm_head") and self.lm_head):
            return None
        listed = self.modules_in_block_to_quantize
        if in_a_layer and listed is not None and not any(f".{name}".endswith(f".{each}") for each in listed):
            return None
        settings = ModuleSettings(self.bits, self.group_size, self.sym, self.desc_act, self.where)
        for pattern, changes in self.dynamic:
            if re.match(_expression(pattern), name):
                if pattern.startswith("-:"):
                    return None
                known = {key: changes[key] for key in ("bits", "group_size", "sym", "desc_act") if key in changes}
                return dataclasses.replace(settings, **known, rule=f"{self.where}: dynamic {pattern!r}")
        return settings

    def unused_rules(self, names: Iterable[str]) -> list[str]:
        """Patterns of `dynamic` that match none of these modules, e.g. because their prefix is spelled wrongly."""
        names = list(names)
        patterns = [pattern for pattern, _ in self.dynamic]
        return [each for each in patterns if not any(re.match(_expression(each), name) for name in names)]

    def _from_schemes(self, name: str) -> ModuleSettings | None:
        # A target is a name, "re:" and an expression, or a PyTorch class.
        kind = "Embedding" if name.endswith(EMBEDDINGS) else "Linear"

        def named(target: str) -> bool:
            if target.startswith("re:"):
                return re.match(target[3:], name) is not None
            return target in (name, kind)

        if any(named(each) for each in self.modules_to_not_convert):
            return None
        return next((scheme.settings for scheme in self.schemes if any(map(named, scheme.targets))), None)


def _expression(pattern: str) -> str:
    """A dynamic rule's regular expression: the pattern without its prefix "-:" or "+:"."""
    return pattern[2:] if pattern.startswith(("-:", "+:")) else pattern


def _bits(keys: JsonKeys, name: str) -> int:
    bits = keys.take(int, name)
    if bits not in BITS:
        raise CheckpointError(f"{keys.where}: {name} is {bits}, expected one of {', '.join(map(str, BITS))}.")
    return bits


def _group_size(keys: JsonKeys) -> int:
    group_size = keys.take(int, "group_size")
    if group_size < 1 and group_size != -1:
        raise CheckpointError(f"{keys.where}: group_size is {group_size}, expected −1 or at least 1.")
    return group_size


def _regex(pattern: str, where: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{where}: {pattern!r} is not a regular expression ({error}).") from error
    return pattern


def _names(keys: JsonKeys, name: str) -> tuple[str, ...] | None:
    """A list of names, possibly grouped into inner lists."""
    value = keys.take(list, name, default=None)
    if value is None:
        return None
    flat = [each for item in value for each in (item if isinstance(item, list) else [item])]
    if not all(isinstance(each, str) for each in flat):
        raise CheckpointError(f"{keys.where}: {name} is {value!r}, expected names of modules.")
    return tuple(flat)


def _gptq(keys: JsonKeys) -> dict[str, Any]:
    for name in ("rotation", "adapter", "activation", "preprocessors", "smoother"):
        keys.must_be(name, None, "it changes the model beyond its weights, which is not supported")
    keys.must_be("is_marlin_format", False, "Marlin's own layout is not supported; export as 'gptq'")
    keys.must_be("pack_dtype", "int32", "only 32-bit words are supported; export with pack_dtype int32")
    keys.must_be("data_type", "int", "only integer weights are supported")
    file_format = keys.take(str, "checkpoint_format", "format", default="gptq")
    if file_format not in GPTQ_FORMATS:
        raise CheckpointError(
            f"{keys.where}: checkpoint_format is {file_format!r}, expected one of {', '.join(GPTQ_FORMATS)}; "
            "export the model in one of them."
        )
    bits = _bits(keys, "bits")
    dynamic = _dynamic(keys)
    if file_format == "gptq_p" and 3 in (bits, *(changes.get("bits") for _, changes in dynamic)):
        raise CheckpointError(f"{keys.where}: 3 bits are not supported in checkpoint_format 'gptq_p', only in 'gptq'.")
    meta = keys.raw.get("meta")
    quantizer = meta.get("quantizer", "") if isinstance(meta, dict) else ""
    return {
        "bits": bits,
        "group_size": _group_size(keys),
        "sym": keys.take(bool, "sym", default=None),
        "desc_act": keys.take(bool, "desc_act", default=None),
        "checkpoint_format": file_format,
        "lm_head": keys.take(bool, "lm_head", default=False),
        "dynamic": dynamic,
        "modules_in_block_to_quantize": _names(keys, "modules_in_block_to_quantize"),
        "modules_to_not_convert": _names(keys, "modules_to_not_convert") or (),
        "quantizer": ",".join(map(str, quantizer)) if isinstance(quantizer, list) else str(quantizer),
    }


def _dynamic(keys: JsonKeys) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """GPTQModel's rules, exclusions first as it sorts them; a pattern is matched from the name's beginning."""
    rules = []
    for pattern, changes in keys.take(dict, "dynamic", default={}).items():
        where = f"{keys.where}: dynamic {pattern!r}"
        _regex(_expression(pattern), where)
        if not isinstance(changes, dict):
            raise CheckpointError(f"{where}: is {changes!r}, expected an object of settings.")
        rule = JsonKeys(changes, where)
        if "bits" in changes:
            _bits(rule, "bits")
        if "group_size" in changes:
            _group_size(rule)
        for name in ("sym", "desc_act"):
            rule.take(bool, name, default=None)
        rule.must_be("pack_dtype", "int32", "only 32-bit words are supported")
        rule.must_be("adapter", None, "it changes the model beyond its weights, which is not supported")
        rule.ignore(MEANINGLESS)
        if not pattern.startswith("-:"):
            rule.refuse_unread("it may change what the weights mean.")
        rules.append((pattern, changes))
    return tuple(sorted(rules, key=lambda rule: not rule[0].startswith("-:")))


def _compressed_tensors(keys: JsonKeys) -> dict[str, Any]:
    file_format = keys.take(str, "format")
    keys.must_be("kv_cache_scheme", None, "a quantized cache is chosen when the model is loaded, not by the file")
    for name in ("sparsity_config", "transform_config"):
        if keys.raw.get(name) and keys.raw[name].get("format", "") not in ("", "dense"):
            raise CheckpointError(f"{keys.where}: {name} is {keys.raw[name]!r:.80}, which is not supported.")
        if keys.raw.get(name, {}) and "config_groups" in keys.raw[name]:
            raise CheckpointError(f"{keys.where}: {name} transforms activations, which is not supported.")
    schemes = []
    for group, raw in keys.take(dict, "config_groups").items():
        schemes.append(_scheme(JsonKeys(raw, f"{keys.where}: config_groups {group!r}"), file_format))
    if not schemes:
        raise CheckpointError(f"{keys.where}: config_groups is empty, expected the settings of at least one.")
    first = schemes[0].settings
    ignored = _names(keys, "ignore") or ()
    for each in ignored:
        _regex(each[3:] if each.startswith("re:") else "", f"{keys.where}: ignore")
    return {
        "bits": first.bits,
        "group_size": first.group_size,
        "sym": first.sym,
        "desc_act": first.desc_act,
        "checkpoint_format": "pack-quantized",
        "modules_to_not_convert": ignored,
        "schemes": tuple(schemes),
        "quantizer": f"compressed-tensors:{keys.raw.get('version', '')}",
    }


def _scheme(keys: JsonKeys, file_format: str) -> Scheme:
    if (own := keys.take(str, "format", default=file_format)) != "pack-quantized":
        raise CheckpointError(
            f"{keys.where}: format is {own!r}, expected 'pack-quantized'; compress the model again in that format."
        )
    keys.must_be("input_activations", None, "quantized activations are not supported")
    keys.must_be("output_activations", None, "quantized activations are not supported")
    targets = _names(keys, "targets") or ()
    for target in targets:
        _regex(target[3:] if target.startswith("re:") else "", f"{keys.where}: targets")
    weights = JsonKeys(keys.take(dict, "weights"), f"{keys.where}: weights")
    keys.refuse_unread("it is none of a config group's keys.")
    weights.must_be("type", "int", "only integer weights are supported")
    weights.must_be("dynamic", False, "weights are quantized once")
    weights.ignore(["observer", "observer_kwargs", "scale_dtype", "zp_dtype"])
    weights.must_be("block_structure", None, "two-dimensional blocks are not supported")
    strategy = weights.take(str, "strategy", default="group")
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"{weights.where}: strategy is {strategy!r}, expected 'group' or 'channel'.")
    actorder = weights.take((str, bool), "actorder", default=False)
    bits = weights.take(int, "num_bits")
    if bits not in PACKED_BITS:
        raise CheckpointError(
            f"{weights.where}: num_bits is {bits}, expected one of {', '.join(map(str, PACKED_BITS))}."
        )
    group_size = -1
    if strategy == "group":
        group_size = _group_size(weights)
    weights.ignore(["group_size"])
    sym = weights.take(bool, "symmetric", default=True)
    weights.refuse_unread("it may change what the weights mean.")
    return Scheme(targets, ModuleSettings(bits, group_size, sym, bool(actorder), weights.where))


# What must agree between the two files; sym and desc_act are read from the tensors.
TENSOR_FIELDS = ("method", "bits", "group_size", "checkpoint_format", "lm_head", "dynamic")


def _refuse_disagreement(one: QuantizationConfig, other: QuantizationConfig) -> None:
    spelled = {"checkpoint_format": ("checkpoint_format", "format"), "method": ("quant_method", "method")}
    for field in (*TENSOR_FIELDS, "sym", "desc_act"):
        names = spelled.get(field, (field,))
        if not all(any(config.raw.get(name) is not None for name in names) for config in (one, other)):
            continue
        found, contradiction = getattr(one, field), getattr(other, field)
        if json.dumps(found, sort_keys=True, default=list) == json.dumps(contradiction, sort_keys=True, default=list):
            continue
        message = f"{one.where}: {field} is {found!r} but {contradiction!r} in {other.where}"
        if field in TENSOR_FIELDS:
            raise CheckpointError(f"{message}; correct the wrong one.")
        logger.warning("%s; the tensors decide.", message)

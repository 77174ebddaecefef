"""How a model is quantized: the user's settings, the JSON that stands for them in the file, and each matrix's own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen_jax.config import QuantizationConfig
from qwen_jax.quantize.gptq import MatrixSettings

FORMATS = ("gptq", "gptq_v2", "compressed-tensors")


@dataclasses.dataclass(frozen=True)
class QuantizeSettings:
    """Everything that the quantized numbers depend on, beside the model and the calibration tokens.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; −1 for all of them.
        sym: one zero-point for all groups.
        desc_act: act-order: rows are rounded, and groups formed, by falling activity. Costs a gather at run time unless
            `static_groups`.
        static_groups: scales from the unrounded weights.
        group_aware: without desc_act, round rows by falling activity inside their groups (no cost at run time).
        damp: see `MatrixSettings`.
        scale_search: see `MatrixSettings`.
        propagation: 0 to 1: how much of the error that earlier quantized modules left in a module's inputs, and in the
            residual stream, its weights make up for. 0 saves a float pass over the calibration data. After QEP (Arai
            and Ichikawa, 2025, arXiv:2504.09629), whose target leaves the residual stream out.
        lm_head: quantize the output projection too, if it is not the embedding.
        dynamic: settings of some modules, as GPTQModel's: {"+:regular expression": {"bits": 8}, "-:…": {}}; "-:" leaves
            a module in float. Matched against the file's module names, from their beginning.
        format: "gptq" (what AutoGPTQ writes), "gptq_v2" or "compressed-tensors" (pack-quantized). GPTQModel reads
            asymmetric weights of others in "gptq_v2" alone; compressed-tensors reads act-order only with
            `static_groups`, and nothing else is written.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    group_aware: bool = True
    damp: float = 0.01
    scale_search: bool = True
    propagation: float = 1.0
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    format: str = "gptq"

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, expected one of {FORMATS}.")
        if not 0 <= self.propagation <= 1:
            raise ValueError(f"propagation is {self.propagation}, expected 0 to 1.")
        if self.format == "compressed-tensors" and self.dynamic:
            raise ValueError("dynamic: is not written in format 'compressed-tensors'; use format 'gptq'.")
        if self.format == "compressed-tensors" and self.desc_act and not self.static_groups:
            raise ValueError(
                "desc_act: compressed-tensors 0.20 no longer reads groups formed along act-order; add static_groups, "
                "which it reads and which cost nothing at run time, or use format 'gptq'."
            )
        MatrixSettings(self.bits, self.group_size, damp=self.damp)  # checks them
        self.parsed()

    def json(self) -> dict[str, Any]:
        """quantize_config.json, or config.json's section: what AutoGPTQ 0.7.1 writes, and more where it is needed.

        But for `is_marlin_format`, which AutoGPTQ takes for false where it is absent and GPTQModel 7.7 refuses.
        """
        if self.format == "compressed-tensors":
            return self._compressed_tensors()
        settings: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": self.damp,
            "desc_act": self.desc_act,
            "static_groups": self.static_groups,
            "sym": self.sym,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
            "checkpoint_format": self.format,
        }
        if self.lm_head:
            settings["lm_head"] = True
        if self.dynamic:
            settings["dynamic"] = {pattern: dict(changes) for pattern, changes in self.dynamic.items()}
        return settings

    def _compressed_tensors(self) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.sym,
            "strategy": "channel" if self.group_size == -1 else "group",
            "group_size": None if self.group_size == -1 else self.group_size,
            "actorder": None,  # static groups lie in the natural order, whatever that of rounding was
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [] if self.lm_head else ["lm_head"],
        }

    def parsed(self) -> QuantizationConfig:
        """The JSON as our own reader understands it."""
        return QuantizationConfig.from_dict(self.json(), "settings")

    def matrix(self, name: str, parsed: QuantizationConfig) -> MatrixSettings | None:
        """The settings of the module that the file calls `name`, by `parsed()`; None if it stays float."""
        module = parsed.for_module(name)
        if module is None:
            return None
        order = "activation" if module.desc_act else "group_aware" if self.group_aware else "natural"
        return MatrixSettings(
            bits=module.bits,
            group_size=module.group_size,
            sym=bool(module.sym),
            order=order,
            static_groups=self.static_groups,
            damp=self.damp,
            scale_search=self.scale_search,
            smallest_zero=1 if self.format == "gptq" else 0,
        )

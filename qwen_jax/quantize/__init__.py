"""Making quantized checkpoints: GPTQ with calibration data, rounding to nearest without."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_jax.quantize.calibration import read_calibration
    from qwen_jax.quantize.pipeline import quantize
    from qwen_jax.quantize.settings import QuantizeSettings
    from qwen_jax.quantize.streams import ModuleReport

__all__ = ["ModuleReport", "QuantizeSettings", "quantize", "read_calibration"]

_PUBLIC = {
    "quantize": "pipeline",
    "QuantizeSettings": "settings",
    "ModuleReport": "streams",
    "read_calibration": "calibration",
}


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)

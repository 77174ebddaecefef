"""Quantized Qwen in JAX: packed Int4 and Int8 weights, an 8-bit KV cache, Pallas kernels for GPU and TPU.

>>> from qwen_jax import AutoTokenizer, QwenForCausalLM
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .causal_lm import QwenForCausalLM
    from .tokenizer import AutoTokenizer

__all__ = ["AutoTokenizer", "QwenForCausalLM", "__version__"]
__version__ = "0.1.0"

# Imported when first asked for: `import qwen_jax` alone loads neither JAX nor transformers (quick `qwen-jax --help`).
_PUBLIC = {"QwenForCausalLM": ".causal_lm", "AutoTokenizer": ".tokenizer"}


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})

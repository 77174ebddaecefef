"""What a quantized model costs: perplexity, divergence from the float model, tasks."""

from qwen_jax.evaluate.perplexity import perplexity

__all__ = ["perplexity"]

"""Kernels for quantized inference: packed matmul and attention over an 8-bit KV cache. Imports jax alone."""

"""Quantized matmul whose sums have the same bits in any order (`exact_sums`): a layer dequantized, then multiplied."""

import jax
import jax.numpy as jnp

from pallas_kernels import exact_sums
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

unsupported = xla.unsupported


def form(shape: MatmulShape, chip: str) -> str:
    """How `run` computes `shape` on `chip`."""
    del shape, chip
    return "dequantized, sums exact in any order"


def run(x_MI: jax.Array, weight: QuantizedTensor, layer, bias_O, chip: str) -> jax.Array:
    """[M, O] in x's dtype; x's columns are already in the order of the stored rows."""
    del chip
    result_MO = exact_sums.product(x_MI.astype(jnp.float32), matrix(weight, layer))
    if bias_O is not None:
        result_MO = result_MO + bias_O.astype(jnp.float32)
    return result_MO.astype(x_MI.dtype)


def matrix(weight: QuantizedTensor, layer) -> jax.Array:
    """float32 [in, out] of one layer, rows in their stored order."""
    return xla.dequantize(weight, layer, jnp.float32, narrow=False)

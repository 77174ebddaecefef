"""Dense matmul whose sums have the same bits in any order (`exact_sums`)."""

import jax
import jax.numpy as jnp

from pallas_kernels import exact_sums
from pallas_kernels.dense_matmul import layout, xla
from pallas_kernels.dense_matmul.tensor import DenseTensor


def form(weight: DenseTensor, rows: int, chip: str) -> str:
    """How `run` multiplies."""
    del weight, rows, chip
    return "sums exact in any order"


def run(x_MI: jax.Array, weight: DenseTensor, layer, bias_O, chip: str, out_dtype) -> jax.Array:
    """[M, O] in `out_dtype`."""
    del chip
    result_MO = exact_sums.product(x_MI.astype(jnp.float32), matrix(weight, layer))
    if bias_O is not None:
        result_MO = result_MO + bias_O.astype(jnp.float32)
    return result_MO.astype(out_dtype)


def matrix(weight: DenseTensor, layer) -> jax.Array:
    """float32 [in, out] of one layer."""
    return layout.to_plain(xla._single(weight, layer)).data.astype(jnp.float32)

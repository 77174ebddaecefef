"""The product with the transposed weight: the derivative of `dense_matmul` for its input."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dense_matmul import layout, xla
from pallas_kernels.dense_matmul.tensor import DenseTensor


def run(g_MO: jax.Array, weight: DenseTensor, layer, *, dtype, chip: str) -> jax.Array:
    """Σₒ g[m, o] · w[i, o], [M, in] in `dtype` (that of the product's input), sums in float32.

    On a CPU 16-bit weights are widened a part at a time. Elsewhere g is rounded to the weight's dtype where the input
    had it, as usual in mixed precision, and the weight is not copied.
    """
    weight = xla._single(weight, layer)
    if chip != "cpu":
        weight = layout.to_plain(weight) if weight.layout == "row_pairs" else weight
        native = weight.data.dtype if dtype == weight.data.dtype else jnp.dtype(jnp.float32)
        return _dot(g_MO.astype(native), weight.data.astype(native), weight.layout).astype(dtype)
    parts = xla._parts(weight.out_features, weight.in_features * 4)
    if weight.dtype == "float32" or parts == 1:
        return _wide(g_MO, weight).astype(dtype)
    out, axis = weight.out_features // parts, 0 if weight.layout == "transposed" else 1

    def add(total_MI, index):
        columns = dataclasses.replace(weight, data=lax.dynamic_slice_in_dim(weight.data, index * out, out, axis))
        return total_MI + _wide(lax.dynamic_slice_in_dim(g_MO, index * out, out, 1), columns), None

    zeros_MI = jnp.zeros((g_MO.shape[0], weight.in_features), jnp.float32)
    return lax.scan(add, zeros_MI, jnp.arange(parts, dtype=jnp.int32))[0].astype(dtype)


def _wide(g_MO, weight: DenseTensor):
    weight = layout.to_plain(weight) if weight.layout == "row_pairs" else weight
    return _dot(g_MO.astype(jnp.float32), weight.data.astype(jnp.float32), weight.layout)


def _dot(g_MO, data, form: str):
    return lax.dot_general(
        g_MO,
        data,
        (((1,), (0 if form == "transposed" else 1,)), ((), ())),
        precision=lax.Precision.HIGHEST if data.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

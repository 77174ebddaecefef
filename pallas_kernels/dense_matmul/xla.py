"""Dense matmul and embedding lookup in plain XLA, the only kernel of these operations."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dense_matmul.layout import to_plain
from pallas_kernels.dense_matmul.tensor import DenseTensor


def run(x_MI: jax.Array, weight: DenseTensor, layer, bias_O, chip: str) -> jax.Array:
    """[M, O] in x's dtype, sums in float32."""
    del chip
    if layer is not None:
        data = lax.dynamic_index_in_dim(jnp.asarray(weight.data), layer, 0, keepdims=False)
        weight = DenseTensor(data, weight.dtype, weight.in_features, weight.layout)
    weight_IO = to_plain(weight).data.astype(jnp.float32)
    result_MO = jnp.dot(x_MI.astype(jnp.float32), weight_IO, precision=lax.Precision.HIGHEST)
    if bias_O is not None:
        result_MO = result_MO + bias_O.astype(jnp.float32)
    return result_MO.astype(x_MI.dtype)


def lookup(weight: DenseTensor, ids: jax.Array) -> jax.Array:
    """[..., D] of the table's dtype: columns `ids` of the logical [D, V] table."""
    data = jnp.asarray(weight.data)
    if weight.layout == "transposed":
        return data[ids]
    columns = jnp.moveaxis(data[:, ids], 0, -1)
    if weight.layout == "row_pairs":
        halves = lax.bitcast_convert_type(columns, jnp.dtype(weight.dtype))
        columns = halves.reshape(*ids.shape, weight.in_features)
    return columns

"""Layouts of a dense matrix, all bit-exact permutations of the same elements."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_kernels.dense_matmul.tensor import DenseTensor

SIXTEEN_BITS = ("bfloat16", "float16")


def to_transposed(weight: DenseTensor) -> DenseTensor:
    """The same matrix in layout "transposed", as files hold it."""
    if weight.layout == "transposed":
        return weight
    return dataclasses.replace(weight, data=jnp.swapaxes(to_plain(weight).data, -1, -2), layout="transposed")


def to_plain(weight: DenseTensor) -> DenseTensor:
    """The same matrix in layout "plain"."""
    data = jnp.asarray(weight.data)
    if weight.layout == "transposed":
        data = jnp.swapaxes(data, -1, -2)
    elif weight.layout == "row_pairs":
        halves = lax.bitcast_convert_type(data, jnp.dtype(weight.dtype))  # [..., in / 2, out, 2], low half first
        data = jnp.swapaxes(halves, -1, -2).reshape(*weight.stack, weight.in_features, weight.out_features)
    return dataclasses.replace(weight, data=data, layout="plain")


def to_row_pairs(weight: DenseTensor) -> DenseTensor:
    """The same matrix in layout "row_pairs".

    Raises:
        ValueError: unless the dtype has 16 bits and in_features is even.
    """
    if weight.layout == "row_pairs":
        return weight
    if weight.dtype not in SIXTEEN_BITS or weight.in_features % 2:
        raise ValueError(
            f"layout 'row_pairs' holds bfloat16 or float16 and an even number of rows, got {weight.dtype} and "
            f"{weight.in_features}. Keep layout {weight.layout!r}."
        )
    rows = to_plain(weight).data
    pairs = rows.reshape(*weight.stack, weight.in_features // 2, 2, weight.out_features)
    data = lax.bitcast_convert_type(jnp.swapaxes(pairs, -1, -2), jnp.int32)
    return dataclasses.replace(weight, data=data, layout="row_pairs")

"""Layouts of a dense matrix: permutations of the same bits. NumPy arrays stay on the host, JAX arrays on their device."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dense_matmul.tensor import DenseTensor

SIXTEEN_BITS = ("bfloat16", "float16")


def to_transposed(weight: DenseTensor) -> DenseTensor:
    """The same matrix in layout "transposed", as files hold it."""
    if weight.layout == "transposed":
        return weight
    return _replace(weight, _swap(to_plain(weight).data), "transposed")


def to_plain(weight: DenseTensor) -> DenseTensor:
    """The same matrix in layout "plain"."""
    if weight.layout == "transposed":
        return _replace(weight, _swap(weight.data), "plain")
    if weight.layout == "row_pairs":
        halves = _bitcast(weight.data[..., None], jnp.dtype(weight.dtype))  # [..., in / 2, out, 2], low half first
        rows = _swap(halves).reshape(*weight.stack, weight.in_features, weight.out_features)
        return _replace(weight, rows, "plain")
    return weight


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
    pairs = to_plain(weight).data.reshape(*weight.stack, weight.in_features // 2, 2, weight.out_features)
    return _replace(weight, _bitcast(_swap(pairs), jnp.dtype("int32"))[..., 0], "row_pairs")


def _replace(weight: DenseTensor, data, layout: str) -> DenseTensor:
    return dataclasses.replace(weight, data=data, layout=layout)


def _swap(array):
    return array.swapaxes(-1, -2)


def _bitcast(array, dtype):
    """Reinterprets the last axis, one 32-bit element or two 16-bit ones, keeping the axis."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).view(dtype)
    if dtype.itemsize == 2:
        return lax.bitcast_convert_type(array[..., 0], dtype)
    return lax.bitcast_convert_type(array, dtype)[..., None]

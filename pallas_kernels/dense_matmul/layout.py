"""Layouts of a dense matrix, permutations of the same bits. NumPy arrays stay NumPy (contiguous), JAX arrays JAX."""

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
    return _replace(weight, _swap(_plain(weight)), "transposed")


def to_plain(weight: DenseTensor) -> DenseTensor:
    """The same matrix in layout "plain"."""
    return weight if weight.layout == "plain" else _replace(weight, _plain(weight), "plain")


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
    pairs = _plain(weight).reshape(*weight.stack, weight.in_features // 2, 2, weight.out_features)
    return _replace(weight, _bitcast(_swap(pairs), jnp.dtype("int32"))[..., 0], "row_pairs")


def _plain(weight: DenseTensor):
    """[*stack, in, out], a view where NumPy can give one."""
    if weight.layout == "transposed":
        return _swap(weight.data)
    if weight.layout == "row_pairs":
        halves = _bitcast(weight.data[..., None], jnp.dtype(weight.dtype))  # [..., in / 2, out, 2], low half first
        return _swap(halves).reshape(*weight.stack, weight.in_features, weight.out_features)
    return weight.data


def _replace(weight: DenseTensor, data, layout: str) -> DenseTensor:
    data = np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data
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

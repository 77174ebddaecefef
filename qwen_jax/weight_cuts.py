"""Cutting a matrix on the host: some of its columns, or some of its rows with groups that still fit, exactly."""

import dataclasses

import numpy as np

from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor, layout


def take_columns(weight: QuantizedTensor | DenseTensor, columns_O: np.ndarray):
    """The matrix of these columns, a column of zeros for −1; the result's arrays are NumPy's, perhaps views.

    Args:
        weight: one matrix in layout "gptq" or "transposed".
        columns_O: int [out].
    """
    if isinstance(weight, DenseTensor):
        _expect(weight, "transposed")
        return dataclasses.replace(weight, data=_take(weight.data, columns_O, 0))
    _expect(weight, "gptq")
    middle = 1 << (weight.bits - 1)
    return dataclasses.replace(
        weight,
        packed=_take(weight.packed, columns_O, 1),
        scales=_take(weight.scales, columns_O, 1),  # 0 for −1: the column is zero whatever its integers are
        zeros=None if weight.zeros is None else _take(weight.zeros, columns_O, 1, middle),
    )


def take_rows(weight: QuantizedTensor | DenseTensor, rows_I: np.ndarray, group_size: int | None = None):
    """The matrix of these stored rows, a row of zeros for −1; the result's arrays are NumPy's.

    Args:
        weight: one matrix in layout "gptq" (without permutation) or "transposed".
        rows_I: int [in].
        group_size: the result's, as `common_group_size` gives it; a group of the weight may be cut into several.
    """
    if isinstance(weight, DenseTensor):
        _expect(weight, "transposed")
        return dataclasses.replace(weight, data=_take(weight.data, rows_I, 1), in_features=len(rows_I))
    _expect(weight, "gptq")
    assert group_size is not None and weight.permutation is None
    bits, middle = weight.bits, 1 << (weight.bits - 1)
    groups_I = np.where(rows_I < 0, -1, rows_I // weight.group_size)
    padding = -len(rows_I) % group_size
    groups_g = np.pad(groups_I, (0, padding), constant_values=-1).reshape(-1, group_size).max(1)
    zeros = None if weight.zeros is None else _take(weight.zeros, groups_g, 0, middle)
    packed = _whole_words(weight, rows_I)
    if packed is None:
        q_IO = layout.unpack(weight.packed, bits, weight.in_features)[np.maximum(rows_I, 0)]
        # A row of zeros is one whose integers are the zero-point.
        empty_I = rows_I < 0
        q_IO[empty_I] = middle if zeros is None else np.repeat(zeros, group_size, 0)[: len(rows_I)][empty_I]
        packed = layout.pack(q_IO, bits)
    return dataclasses.replace(
        weight,
        packed=packed,
        scales=_take(weight.scales, groups_g, 0),
        zeros=zeros,
        group_size=group_size,
        in_features=len(rows_I),
    )


def common_group_size(rows_NI: np.ndarray, group_size: int) -> int:
    """The longest run that divides `rows_NI`'s length and nowhere mixes rows of two groups; −1 goes with any group."""
    length = rows_NI.shape[1]
    groups_NI = np.where(rows_NI < 0, -1, rows_NI // group_size)
    for size in range(length, 0, -1):
        if length % size:
            continue
        runs = groups_NI.reshape(-1, size)
        if (((runs == runs.max(1, keepdims=True)) | (runs < 0)).all(1)).all():
            return size
    raise AssertionError("a run of one row mixes nothing")


def concatenate(weights: list):
    """Matrices with the same inputs, side by side along `out`."""
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    if isinstance(first, DenseTensor):
        return dataclasses.replace(first, data=np.concatenate([weight.data for weight in weights], axis=-2))
    return dataclasses.replace(
        first,
        packed=np.concatenate([weight.packed for weight in weights], axis=-1),
        scales=np.concatenate([weight.scales for weight in weights], axis=-1),
        zeros=None if first.zeros is None else np.concatenate([weight.zeros for weight in weights], axis=-1),
    )


def take_bias(bias_O: np.ndarray | None, columns_O: np.ndarray) -> np.ndarray:
    """float32 entries of a bias, 0 for −1 and where there is none."""
    return np.zeros(len(columns_O), np.float32) if bias_O is None else _take(bias_O, columns_O, 0).astype(np.float32)


def _whole_words(weight: QuantizedTensor, rows_I: np.ndarray) -> np.ndarray | None:
    """Packed rows copied as words, where rows come in whole words and zero rows can be written so; else None."""
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[weight.bits]  # rows of the fewest whole words
    if len(rows_I) % unit or weight.in_features % unit:
        return None
    runs = rows_I.reshape(-1, unit)
    empty = (runs < 0).all(1)
    aligned = (runs[:, 0] % unit == 0) & (runs == runs[:, :1] + np.arange(unit)).all(1)
    if not (empty | aligned).all() or (empty.any() and weight.zeros is not None):
        return None
    words = unit * weight.bits // 32
    blocks = np.asarray(weight.packed).reshape(-1, words, weight.packed.shape[1])
    middle = layout.pack(np.full((unit, 1), 1 << (weight.bits - 1)), weight.bits)
    result = _take(blocks, np.where(empty, -1, runs[:, 0] // unit), 0)
    if empty.any():
        result[empty] = middle
    return result.reshape(-1, weight.packed.shape[1])


def _take(array, index: np.ndarray, axis: int, fill=0) -> np.ndarray:
    """`array` at these places of one axis, `fill` for −1; a view where that is whole rows, so that a table that is cut
    takes no more memory than one that is not."""
    array = np.asarray(array)
    place = (slice(None),) * axis
    if index[0] >= 0 and (np.diff(index) == 1).all():
        part = array[(*place, slice(int(index[0]), int(index[-1]) + 1))]
        return part if axis == 0 else part.copy()
    result = np.take(array, np.maximum(index, 0), axis=axis)
    result[(*place, index < 0)] = fill
    return result


def _expect(weight, wanted: str) -> None:
    assert weight.layout == wanted and not weight.stack, (weight.layout, weight.stack)

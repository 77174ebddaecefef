"""The "gptq" layout of packed integers, in NumPy: packing, unpacking, and tensors made from integers.

Each column is one stream of bits, lowest first: row r occupies bits r·bits … r·bits + bits − 1 of its column, so that
nibble i of word w is row 8w + i, and a 3-bit integer may lie across two words. This is AutoGPTQ's `qweight`, and,
transposed, compressed-tensors' `weight_packed`.
"""

from typing import Any

import numpy as np

from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

BITS = (2, 3, 4, 8)
WORD = 32


def words(in_features: int, bits: int) -> int:
    """32-bit words of a column: ceil(in_features · bits / 32)."""
    return -(-in_features * bits // WORD)


def pack(q_IO: Any, bits: int) -> np.ndarray:
    """Packs integers along the rows.

    Args:
        q_IO: [*stack, in, out], integers from 0 to 2^bits − 1.
        bits: 1 to 8.

    Returns:
        int32 [*stack, ceil(in · bits / 32), out], C-contiguous; unused high bits of the last word are zero.

    Raises:
        ValueError: if an integer does not fit into `bits`.
    """
    q_IO = np.asarray(q_IO)
    if q_IO.size and (q_IO.min() < 0 or q_IO.max() >= 1 << bits):
        raise ValueError(
            f"q_IO holds integers from {q_IO.min()} to {q_IO.max()}, expected 0 to {(1 << bits) - 1} for {bits} bits."
        )
    *stack, in_features, out_features = q_IO.shape
    blocks = -(-in_features // WORD)  # 32 rows fill `bits` words exactly
    packed = np.zeros((*stack, blocks, bits, out_features), np.uint32)
    for row in range(min(WORD, in_features)):
        q_BO = q_IO[..., row::WORD, :].astype(np.uint32)
        word, shift = divmod(row * bits, WORD)
        count = q_BO.shape[-2]
        packed[..., :count, word, :] |= q_BO << np.uint32(shift)
        if shift + bits > WORD:
            packed[..., :count, word + 1, :] |= q_BO >> np.uint32(WORD - shift)
    packed = packed.reshape(*stack, blocks * bits, out_features)[..., : words(in_features, bits), :]
    return np.ascontiguousarray(packed).view(np.int32)


def unpack(packed: Any, bits: int, in_features: int) -> np.ndarray:
    """The inverse of `pack`: uint8 [*stack, in_features, out].

    Raises:
        ValueError: if `packed` has not ceil(in_features · bits / 32) rows.
    """
    packed = np.ascontiguousarray(packed).view(np.uint32)
    *stack, rows, out_features = packed.shape
    if rows != words(in_features, bits):
        raise ValueError(
            f"packed has {rows} rows of words, expected {words(in_features, bits)} for {in_features} inputs of {bits} "
            "bits."
        )
    q_IO = np.empty((*stack, in_features, out_features), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for row in range(min(WORD, in_features)):
        word, shift = divmod(row * bits, WORD)
        count = -(-(in_features - row) // WORD)
        q_BO = packed[..., word::bits, :][..., :count, :] >> np.uint32(shift)
        if shift + bits > WORD:
            q_BO = q_BO | packed[..., word + 1 :: bits, :][..., :count, :] << np.uint32(WORD - shift)
        q_IO[..., row::WORD, :] = q_BO & mask
    return q_IO


def from_integers(
    q_IO: Any, scales: Any, zeros: Any = None, permutation: Any = None, *, bits: int, group_size: int = -1
) -> QuantizedTensor:
    """A `QuantizedTensor` in layout "gptq" from its parts.

    Args:
        q_IO: [*stack, in, out], integers from 0 to 2^bits − 1, rows in stored order (sorted by group).
        scales: [*stack, groups, out], a float type.
        zeros: [*stack, groups, out], the zero-points; None if every one is 2^(bits − 1).
        permutation: [*stack, in], the input that each stored row multiplies; None for the natural order.
        bits: 2, 3, 4 or 8.
        group_size: rows that share a scale; −1 for all of them. The last group may be short.

    Raises:
        ValueError: if the shapes disagree or an integer does not fit.

    >>> from_integers(np.full((64, 32), 9), scales=np.full((1, 32), 0.5, np.float16), bits=4).packed.shape
    (8, 32)
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, expected one of {BITS}.")
    q_IO, scales = np.asarray(q_IO), np.asarray(scales)
    *stack, in_features, out_features = q_IO.shape
    if group_size == -1:
        group_size = in_features
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}, expected −1 or at least 1.")
    shape = (*stack, -(-in_features // group_size), out_features)
    if scales.shape != shape:
        raise ValueError(f"scales: shape {scales.shape}, expected {shape} for group_size {group_size}.")
    if zeros is not None:
        zeros = np.asarray(zeros)
        if zeros.shape != shape:
            raise ValueError(f"zeros: shape {zeros.shape}, expected {shape}.")
        if zeros.min() < 0 or zeros.max() >= 1 << bits:
            raise ValueError(f"zeros lie between {zeros.min()} and {zeros.max()}, expected 0 to {(1 << bits) - 1}.")
        zeros = zeros.astype(np.uint8)
    if permutation is not None:
        permutation = np.asarray(permutation, np.int32)
        if permutation.shape != (*stack, in_features) or (np.sort(permutation) != np.arange(in_features)).any():
            raise ValueError(
                f"permutation of shape {permutation.shape} does not hold each of {in_features} inputs once."
            )
    return QuantizedTensor(pack(q_IO, bits), scales, zeros, permutation, bits, group_size, in_features)

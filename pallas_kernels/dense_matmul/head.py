"""Rounding a float head to 8 bits: an option that trades exactness of the logits for half of the head's bytes."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.dense_matmul.layout import to_transposed
from pallas_kernels.dense_matmul.tensor import DenseTensor
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

COLUMNS = 8192  # of the head at a time: the float32 copy stays small


def quantize_head(head: DenseTensor, group_size: int = 64) -> QuantizedTensor:
    """Rounds a head [D, V] to the nearest of 255 symmetric steps, one scale for each `group_size` inputs of a column.

    Scales are bfloat16, rounded up before the weights are divided by them, so that no weight is clipped and the scale's
    own rounding costs nothing. A group of zeros gets scale 1.

    Args:
        head: one matrix (no stack), any layout.
        group_size: inputs that share a scale; the last group may be short.

    Returns:
        QuantizedTensor in layout "gptq", 8 bits, zero-point 128, NumPy leaves.
    """
    if head.stack:
        raise ValueError(f"quantize_head: the head has stack {head.stack}, expected a single matrix.")
    weight_VD = np.asarray(to_transposed(head).data)
    V, D = weight_VD.shape
    groups, rows = -(-D // group_size), -(-D // 4) * 4
    packed = np.empty((rows // 4, V), np.int32)
    scales = np.empty((groups, V), jnp.bfloat16)
    for start in range(0, V, COLUMNS):
        part = np.zeros((min(COLUMNS, V - start), groups * group_size), np.float32)
        part[:, :D] = weight_VD[start : start + COLUMNS]
        part = part.reshape(-1, groups, group_size)
        scale = _round_up(np.abs(part).max(-1) / 127)
        q = np.rint(part / scale[..., None].astype(np.float32)).astype(np.int16) + 128
        bytes_of_rows = np.zeros((len(q), rows), np.uint8)
        bytes_of_rows[:, :D] = q.reshape(len(q), -1)[:, :D]
        packed[:, start : start + COLUMNS] = bytes_of_rows.view("<i4").T
        scales[:, start : start + COLUMNS] = scale.T
    return QuantizedTensor(packed, scales, None, None, bits=8, group_size=group_size, in_features=D)


def _round_up(scale):
    """The least bfloat16 ≥ scale (positive, or 0, which becomes 1)."""
    upper = ((scale.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16).view(jnp.bfloat16)
    return np.where(scale > 0, upper, jnp.bfloat16(1))

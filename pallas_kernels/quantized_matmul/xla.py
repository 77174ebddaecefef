"""Quantized matmul in plain XLA: the kernel that takes every shape, on CPUs, older GPUs and as the last resort."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor


def unsupported(shape: MatmulShape, chip: str) -> str | None:
    """None, or why this kernel cannot run `shape` on `chip`."""
    del chip
    if shape.layout != "gptq":
        return f"it reads layout 'gptq', not {shape.layout!r}"
    return None


def form(shape: MatmulShape, chip: str) -> str:
    """How `run` computes `shape` on `chip`."""
    del shape, chip
    return "dequantize, then float32 dot"


def run(x_MI: jax.Array, weight: QuantizedTensor, layer, bias_O, chip: str) -> jax.Array:
    """[M, O] in x's dtype; x's columns are already in the order of the stored rows."""
    del chip
    weight_IO = dequantize(weight, layer, jnp.float32)
    result_MO = jnp.dot(x_MI.astype(jnp.float32), weight_IO, precision=lax.Precision.HIGHEST)
    if bias_O is not None:
        result_MO = result_MO + bias_O.astype(jnp.float32)
    return result_MO.astype(x_MI.dtype)


def dequantize(weight: QuantizedTensor, layer, dtype) -> jax.Array:
    """[in, out] of one layer, rows in their stored order: scale · (q − zero), computed in float32."""
    packed, scales, zeros = (
        array if array is None or layer is None else lax.dynamic_index_in_dim(jnp.asarray(array), layer, 0, False)
        for array in (weight.packed, weight.scales, weight.zeros)
    )
    q_IO = unpack_rows(jnp.asarray(packed), weight.bits, weight.in_features)
    groups, size = weight.groups, weight.group_size
    padding = groups * size - weight.in_features
    if padding:
        q_IO = jnp.pad(q_IO, ((0, padding), (0, 0)))
    q = q_IO.reshape(groups, size, -1)
    zero = jnp.int32(2 ** (weight.bits - 1)) if zeros is None else jnp.asarray(zeros)[:, None].astype(jnp.int32)
    weight_IO = (q - zero).astype(jnp.float32) * jnp.asarray(scales)[:, None].astype(jnp.float32)
    return weight_IO.reshape(groups * size, -1)[: weight.in_features].astype(dtype)


def unpack_rows(packed: jax.Array, bits: int, rows: int) -> jax.Array:
    """int32 [rows, out] from the bit streams [ceil(rows · bits / 32), out]."""
    if bits in (2, 4, 8):
        shape = (packed.shape[0], 32 // bits, packed.shape[-1])
        shifts = lax.broadcasted_iota(jnp.int32, shape, 1) * bits
        fields = lax.shift_right_logical(jnp.broadcast_to(packed[:, None], shape), shifts)
        return (fields & (2**bits - 1)).reshape(-1, packed.shape[-1])[:rows]
    start = jnp.arange(rows, dtype=jnp.int32) * bits
    word, shift = start // 32, start % 32
    low = lax.shift_right_logical(packed[word], jnp.broadcast_to(shift[:, None], (rows, packed.shape[-1])))
    following = packed[jnp.minimum(word + 1, packed.shape[0] - 1)]
    # A field that crosses into the next word; (x << 1) << (31 − s) is x << (32 − s) without a shift by 32.
    high = (following << 1) << (31 - shift)[:, None]
    return (low | high) & (2**bits - 1)

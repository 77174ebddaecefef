"""What a `QuantizedTensor` means, in NumPy and float64; shares no code with the kernels or with `layout.py`."""

import numpy as np

from pallas_kernels.quantized_matmul.tensor import QuantizedTensor


def dequantize(weight: QuantizedTensor, dtype: type = np.float64) -> np.ndarray:
    """The matrix itself, [*stack, in, out], rows in the order of the *inputs* (act-order undone).

    w[permutation[r], o] = scales[r // group_size, o] · (q[r, o] − zeros[r // group_size, o]).

    Raises:
        ValueError: if the tensor is not in layout "gptq".
    """
    if weight.layout != "gptq":
        raise ValueError(f"layout is {weight.layout!r}, expected 'gptq'; take the prepacked form back first.")
    if weight.stack:
        parts = (weight.packed, weight.scales, weight.zeros, weight.permutation)
        layers = [
            dequantize(
                QuantizedTensor(
                    *(None if part is None else part[layer] for part in parts),
                    bits=weight.bits,
                    group_size=weight.group_size,
                    in_features=weight.in_features,
                ),
                dtype,
            )
            for layer in range(weight.stack[0])
        ]
        return np.stack(layers)
    # One column of words is one string of bits: little-endian bytes, lowest bit first.
    packed = np.asarray(weight.packed).astype("<i4")
    stream = np.unpackbits(np.ascontiguousarray(packed.T).view(np.uint8), axis=1, bitorder="little")
    bits_OIB = stream[:, : weight.in_features * weight.bits].reshape(-1, weight.in_features, weight.bits)
    q_IO = (bits_OIB * (1 << np.arange(weight.bits))).sum(axis=-1).T.astype(dtype)
    group_I = np.arange(weight.in_features) // weight.group_size
    zeros = np.full(weight.scales.shape, 1 << (weight.bits - 1)) if weight.zeros is None else np.asarray(weight.zeros)
    stored_IO = np.asarray(weight.scales).astype(dtype)[group_I] * (q_IO - zeros.astype(dtype)[group_I])
    if weight.permutation is None:
        return stored_IO
    natural_IO = np.empty_like(stored_IO)
    natural_IO[np.asarray(weight.permutation)] = stored_IO
    return natural_IO

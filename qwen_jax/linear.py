"""Linear layers: where a weight's storage (float or packed, stacked over layers, fused or not) is known; nowhere else.

A weight of a decoder layer is stacked over the layers of its block and called with the layer's index, so that kernels
slice inside and nothing is copied.
"""

import jax.numpy as jnp
from flax import nnx

from pallas_kernels import exact_sums
from pallas_kernels.dense_matmul import DenseTensor, dense_matmul, embedding_lookup
from pallas_kernels.dense_matmul import exact as exact_dense
from pallas_kernels.quantized_matmul import QuantizedTensor, quantized_matmul
from pallas_kernels.quantized_matmul import exact as exact_quantized

nnx.register_data_type(QuantizedTensor)
nnx.register_data_type(DenseTensor)


def at_layer(stacked, layer):
    """One layer's entry of a small stacked array; the array itself where it is not stacked (`layer` None)."""
    return stacked if layer is None else stacked[layer]


class Projection(nnx.Module):
    """y of x: what a layer adds to its residual stream."""

    def add(self, x, hidden, layer=None):
        """hidden + y, both [..., out]."""
        return hidden + self(x, layer)

    def add_norm(self, x, hidden, norm: "RMSNorm", layer=None):
        """(`add`, its norm)."""
        hidden = self.add(x, hidden, layer)
        return hidden, norm(hidden, layer)


class Linear(Projection):
    """y = x · W + b over one stored matrix.

    Attributes:
        weight: QuantizedTensor or DenseTensor of logical shape [*stack, in, out].
        bias: [*stack, out] or None.
        axes: logical names of the (in, out) dimensions, resolved in `sharding.py`.
    """

    def __init__(self, weight: QuantizedTensor | DenseTensor, bias=None, *, axes=(None, None), kernels="auto"):
        self.weight = weight
        self.bias = nnx.data(bias)
        self.axes = tuple(axes)
        self.kernels = kernels

    def __call__(self, x, layer=None, out_dtype=None):
        """[..., in] → [..., out] in `out_dtype`, the dtype of x if None; `layer` indexes the stack."""
        return self._multiply(x, layer, self.bias, out_dtype)

    def lookup(self, ids):
        """int [...] → [..., in]: columns of a single matrix, as the token table's."""
        assert isinstance(self.weight, DenseTensor)  # tables are never quantized
        return embedding_lookup(self.weight, ids)

    def _multiply(self, x, layer, bias_O=None, out_dtype=None):
        if isinstance(self.weight, QuantizedTensor):
            y = quantized_matmul(x, self.weight, layer=layer, bias_O=bias_O, kernels=self.kernels)
            return y if out_dtype is None else y.astype(out_dtype)
        return dense_matmul(x, self.weight, layer=layer, bias_O=bias_O, out_dtype=out_dtype, kernels=self.kernels)

    def _split(self, x, layer, unit: int):
        """x · W as digits that any order adds up exactly, see `exact_sums.split_product`."""
        if isinstance(self.weight, QuantizedTensor):
            matrix_IO = exact_quantized.matrix(self.weight, layer)
        else:
            matrix_IO = exact_dense.matrix(self.weight, layer)
        return exact_sums.split_product(x.astype(jnp.float32), matrix_IO, unit)


class FusedLinear(nnx.Module):
    """Several projections of one input, stored as few matrices as their likeness allows.

    Attributes:
        parts: one Linear for each stored matrix, in the order of the outputs.
        sizes: for each part the widths of the outputs that lie in it side by side.
    """

    def __init__(self, parts: list[Linear], sizes: list[tuple[int, ...]]):
        self.parts = nnx.List(parts)
        self.sizes = tuple(sizes)

    def __call__(self, x, layer=None):
        """[..., in] → one [..., width] for each output."""
        outputs = []
        for part, widths in zip(self.parts, self.sizes, strict=True):
            y = part(x, layer)
            start = 0
            for width in widths:
                outputs.append(y[..., start : start + width])
                start += width
        return tuple(outputs)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, computed in float32.

    Attributes:
        scale: float32 [*stack, features].
        epsilon: added to the mean square.
        exact: sum the squares as `exact_sums` does.
    """

    def __init__(self, scale, epsilon: float, exact: bool = False):
        self.scale = nnx.data(scale)
        self.epsilon, self.exact = epsilon, exact

    def __call__(self, x, layer=None):
        """[..., features] → the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        if self.exact:
            scale = at_layer(self.scale, layer).astype(jnp.float32)
            return exact_sums.rms_norm(x32, scale, self.epsilon).astype(x.dtype)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * (1.0 / jnp.sqrt(mean_square + self.epsilon))
        return (normed * at_layer(self.scale, layer).astype(jnp.float32)).astype(x.dtype)

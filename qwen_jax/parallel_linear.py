"""Linear layers of which each device of a mesh holds a share: for use under `jax.shard_map`.

Column-parallel layers need nothing: a plain `Linear` on a device's own columns. Where rows or the vocabulary are
split, the reduction stands here.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels import exact_sums
from qwen_jax.linear import Linear, at_layer

FEW_ROWS = 64  # up to here a reduction costs its latency, and its width nothing


class RowParallelLinear(Linear):
    """y = Σ over devices of x · W + b: each device multiplies its rows, then one all-reduce.

    Attributes:
        axis: the mesh axis, or axes, the rows are split over.
        inputs: int32 [*stack, in] or None: act-order. Rows sorted by group need inputs of other devices, so that x (the
            attention's output, small) is gathered and row r multiplies entry inputs[r] of it.
        direct: whether a kernel may write to the other devices' memory, see `sharding.Placement`.
        unit: for sums with the same bits however rows are cut: rows that no mesh cuts. None: plain sums.
    """

    def __init__(
        self,
        weight,
        bias=None,
        *,
        axis: tuple[str, ...] | str,
        direct=False,
        inputs=None,
        unit: int | None = None,
        axes=(None, None),
        kernels="auto",
    ):
        super().__init__(weight, bias, axes=axes, kernels=kernels)
        self.axis, self.direct, self.unit = axis, direct, unit
        self.inputs = nnx.data(inputs)

    def __call__(self, x, layer=None, out_dtype=None):
        """[..., in] of this device → [..., out], the same on all devices."""
        if self.inputs is not None:
            x = lax.all_gather(x, self.axis, axis=x.ndim - 1, tiled=True)
            x = jnp.take(x, at_layer(self.inputs, layer), axis=-1)
        dtype = x.dtype if out_dtype is None else out_dtype
        if self.unit is not None:
            total = exact_sums.total(lax.psum(self._split(x, layer, self.unit), self.axis))
            return (total if self.bias is None else total + at_layer(self.bias, layer)).astype(dtype)
        # float16 shares may overflow where their sum does not. Long prompts in bfloat16 are reduced as they are; two
        # shares always, for their sum is rounded once either way. (Cutting prompts, so that a part's reduction runs
        # beside the product of the next, gained nothing: the reductions take multiprocessors from the products.)
        wide = dtype == jnp.float16
        few = math.prod(x.shape[:-1]) <= FEW_ROWS and (lax.axis_size(self.axis) > 2 or self.bias is not None)
        share = self._multiply(x.astype(jnp.float32) if wide else x, layer)
        total = lax.psum(share.astype(jnp.float32) if few else share, self.axis)
        if self.bias is not None:
            total = total.astype(jnp.float32) + at_layer(self.bias, layer)
        return total.astype(dtype)


class VocabularyLinear(Linear):
    """The token table and the head, each device holding some token ids.

    Attributes:
        axis: the mesh axis, or axes, the vocabulary is split over.
        vocab_size: V; the columns of the devices may go beyond it.
        devices: on `axis`.
    """

    def __init__(
        self,
        weight,
        bias=None,
        *,
        axis: tuple[str, ...] | str,
        vocab_size: int,
        devices: int,
        axes,
        kernels="auto",
    ):
        super().__init__(weight, bias, axes=axes, kernels=kernels)
        self.axis, self.vocab_size, self.devices = axis, vocab_size, devices

    def lookup(self, ids):
        """int [...] → [..., D], the same on all devices: each looks up its own ids, one all-reduce adds the zeros."""
        width = self.weight.out_features
        local = ids - lax.axis_index(self.axis) * width
        mine = (local >= 0) & (local < width)
        rows = super().lookup(jnp.where(mine, local, 0))
        return lax.psum(jnp.where(mine[..., None], rows, 0), self.axis)

    def __call__(self, x, layer=None, out_dtype=None):
        """[..., D] → the logits of this device's ids [..., width]; beyond the vocabulary the lowest finite number.

        Finite, because an infinite logit is an error (`NonFiniteLogitsError`).
        """
        logits = super().__call__(x, layer, out_dtype)
        width = logits.shape[-1]
        if width * self.devices == self.vocab_size:
            return logits
        ids = lax.axis_index(self.axis) * width + jnp.arange(width)
        return jnp.where(ids < self.vocab_size, logits, jnp.finfo(logits.dtype).min)

"""Linear layers of which each device of a mesh holds a share: for use under `jax.shard_map`.

Column-parallel layers need nothing: a plain `Linear` on a device's own columns. Where rows or the vocabulary are
split, the reduction stands here.
"""

import functools
import logging
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels import card_sums, exact_sums
from pallas_kernels.chip import default_chip
from pallas_kernels.decode_step import MULTIPROCESSORS
from qwen_jax.linear import Linear, RMSNorm, at_layer

_logger = logging.getLogger(__name__)

FEW_ROWS = 64  # up to here a reduction costs its latency, and its width nothing


class RowParallelLinear(Linear):
    """y = Σ over devices of x · W + b: each device multiplies its rows, then one all-reduce.

    On Hopper GPUs the sum of few rows is taken where it is added to the residual stream, in a launch of each card.

    Attributes:
        axis: the mesh axis, or axes, the rows are split over.
        inputs: int32 [*stack, in] or None: act-order. Rows sorted by group need inputs of other devices, so that x (the
            attention's output, small) is gathered and row r multiplies entry inputs[r] of it.
        direct: whether a kernel may write to the other devices' memory, see `sharding.Placement`.
        peers: for such launches, see `peers.addresses`, or None.
        unit: for sums with the same bits however rows are cut: rows that no mesh cuts. None: plain sums.
    """

    def __init__(
        self,
        weight,
        bias=None,
        *,
        axis: tuple[str, ...] | str,
        direct=False,
        peers=None,
        inputs=None,
        unit: int | None = None,
        axes=(None, None),
        kernels="auto",
    ):
        super().__init__(weight, bias, axes=axes, kernels=kernels)
        self.axis, self.direct, self.unit = axis, direct, unit
        self.peers: Any = nnx.data(peers)
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

    def add(self, x, hidden, layer=None):
        """See `Projection`; [..., in] of this device, the rest the same on all devices."""
        if not self._in_one_launch(hidden):
            return super().add(x, hidden, layer)
        rows = _flat(self._multiply(x, layer)), _flat(hidden)
        return card_sums.add_sum(*rows, self.peers, chip=default_chip()).reshape(hidden.shape)

    def add_norm(self, x, hidden, norm: RMSNorm, layer=None):
        """See `Projection`, as `add`."""
        if not self._in_one_launch(hidden):
            return super().add_norm(x, hidden, norm, layer)
        rows, chip = (_flat(self._multiply(x, layer)), _flat(hidden)), default_chip()
        both = card_sums.add_sum_norm(*rows, norm.scale, layer, self.peers, epsilon=norm.epsilon, chip=chip)
        return tuple(array_MD.reshape(hidden.shape) for array_MD in both)

    def _in_one_launch(self, hidden) -> bool:
        rows, chip = math.prod(hidden.shape[:-1]), default_chip()
        if rows > card_sums.MOST_ROWS or chip not in MULTIPROCESSORS:
            return False
        reason = self._refusal(rows, hidden, chip)
        _log_choice(self.axis, reason)
        return reason is None

    def _refusal(self, rows: int, hidden, chip: str) -> str | None:
        """None where one launch takes the sum, else why not."""
        if self.kernels not in ("auto", "mosaic_gpu"):
            return f"kernels={self.kernels!r} is asked for"
        if self.inputs is not None:
            return "a projection gathers other devices' inputs (act-order)"
        if self.bias is not None:
            return "a projection has a bias"
        if not self.direct:
            return "the devices belong to several processes, or are not numbered in the mesh's order"
        cards = lax.axis_size(self.axis)
        reason = card_sums.unsupported(rows, hidden.shape[-1], cards, hidden.dtype.name, chip)
        if reason is None and self.peers is None:
            return "the devices lie along several axes of the mesh"
        return reason


def _flat(array):
    return array.reshape(-1, array.shape[-1])


@functools.cache
def _log_choice(axis, reason: str | None) -> None:
    """Says once how few rows are summed over a mesh axis on a chip that the launch is written for."""
    form = "one launch each" if reason is None else f"all-reduces, not a launch each: {reason}"
    _logger.info("sums of few rows over %s: %s", axis, form)


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

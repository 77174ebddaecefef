"""Low-rank terms beside a model's projections: y = x · W + (x · A) · B, W as it is stored, packed or not.

The base matrix is never touched: the two small products run beside it, in prefill, in decode and in training. `adapt`
puts an adapter's terms into a model; without one no model contains anything of this file.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qwen_jax.linear import FusedLinear, Linear, Projection, at_layer
from qwen_jax.loading import FUSED
from qwen_jax.parallel_linear import RowParallelLinear


class Term(NamedTuple):
    """The low-rank term of one module, its scale multiplied into `b`.

    Attributes:
        a: [*stack, in, rank].
        b: [*stack, rank, out].
    """

    a: Any
    b: Any


class Dropout(NamedTuple):
    """Which inputs of the low-rank products are dropped while training: `rate` of them, drawn with `key`."""

    rate: float
    key: Any


class AdaptedLinear(Projection):
    """A `Linear` and the terms of its outputs.

    Attributes:
        base: the projection.
        a: [*stack, in, Σ ranks], the terms' side by side: one product for all.
        b: for each term [*stack, rank, width].
        starts: for each term the first column it is added to.
    """

    def __init__(self, base: Linear, terms: Sequence[Term], starts: Sequence[int], dropout: Dropout | None = None):
        self.base = base
        self.a = nnx.data(terms[0].a if len(terms) == 1 else jnp.concatenate([term.a for term in terms], axis=-1))
        self.b = nnx.data(tuple(term.b for term in terms))
        self.starts = tuple(starts)
        self.rate = 0.0 if dropout is None else dropout.rate
        self.key = nnx.data(None if dropout is None else dropout.key)

    @property
    def axes(self):
        """Logical names of the base's dimensions."""
        return self.base.axes

    def array_axes(self) -> list[tuple[Any, tuple[str, ...]]]:
        """Each array of the terms with the names of its dimensions."""
        stack, (rows, columns) = ("layers",) * (self.a.ndim - 2), self.base.axes
        return [(self.a, (*stack, rows, "private")), *((b, (*stack, "private", columns)) for b in self.b)]

    def __call__(self, x, layer=None, out_dtype=None):
        """See `Linear`; on a mesh `x` and the result are those of the base."""
        y = self.base(x, layer, out_dtype)
        a, bs = (_one(array, layer) for array in (self.a, self.b))
        ranks = [b.shape[-2] for b in bs]
        axis = self.base.axis if isinstance(self.base, RowParallelLinear) else None
        if self.key is None:
            hidden = _split(_dot(x, a), ranks)
        else:
            key = self.key if axis is None else jax.random.fold_in(self.key, lax.axis_index(axis))
            keys = jax.random.split(key, len(ranks))
            dropped = [_drop(x, key, self.rate) for key in keys]
            hidden = [_dot(part, a) for part, a in zip(dropped, _split(a, ranks), strict=True)]
        if axis is not None:  # each device has multiplied its own inputs
            hidden = lax.psum(hidden, axis)
        pieces, column = [], 0
        for start, low, b in zip(self.starts, hidden, bs, strict=True):
            pieces.append(y[..., column:start])
            column = start + b.shape[-1]
            delta = _dot(low.astype(x.dtype), b)
            pieces.append((y[..., start:column].astype(jnp.float32) + delta).astype(y.dtype))
        pieces = [piece for piece in (*pieces, y[..., column:]) if piece.shape[-1]]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def adapt(block, terms: Mapping[str, Term], dropout: Dropout | None = None):
    """A copy of a `DecoderLayer` with terms beside its projections; the arrays are shared, not copied.

    Args:
        block: see `model.DecoderLayer`.
        terms: module ("attention.query", "mlp.down"; the first generation's "attention.qkv") → its term, stacked over
            the block's layers, or one layer's where the block is about to run that layer.
        dropout: for training.
    """
    block = jax.tree.map(lambda leaf: leaf, block)  # new modules around the same arrays
    left = dict(terms)

    def key(number: int) -> Dropout | None:
        return None if dropout is None else Dropout(dropout.rate, jax.random.fold_in(dropout.key, number))

    fused = (("attention", block.attention, "qkv"), ("mlp", block.mlp, "gate_up"))
    single = (("attention.output", block.attention, "output"), ("mlp.down", block.mlp, "down"))
    for number, (path, owner, name) in enumerate(fused):
        owner_terms = {each: left.pop(f"{path}.{each}") for each in ("qkv", *FUSED[path]) if f"{path}.{each}" in left}
        if owner_terms:
            setattr(owner, name, _adapt_fused(getattr(owner, name), FUSED[path], owner_terms, key(number)))
    for number, (path, owner, name) in enumerate(single, len(fused)):
        if path in left:
            setattr(owner, name, AdaptedLinear(getattr(owner, name), [left.pop(path)], [0], key(number)))
    if left:
        raise ValueError(f"{next(iter(left))!r} is no projection of a layer.")
    return block


def _adapt_fused(fused: FusedLinear, outputs: Sequence[str], terms: dict[str, Term], dropout: Dropout | None):
    names, parts = iter(outputs), []
    for part, widths in zip(fused.parts, fused.sizes, strict=True):
        chosen, starts, column = [], [], 0
        for width in widths:
            if (name := next(names)) in terms:
                chosen.append(terms[name])
                starts.append(column)
            column += width
        if "qkv" in terms:
            chosen, starts = [terms["qkv"]], [0]
        if chosen and dropout is not None:
            dropout = Dropout(dropout.rate, jax.random.fold_in(dropout.key, len(parts)))
        parts.append(AdaptedLinear(part, chosen, starts, dropout) if chosen else part)
    return FusedLinear(parts, list(fused.sizes))


def _one(arrays, layer):
    """One layer's entry of arrays that are stacked."""
    return jax.tree.map(lambda array: at_layer(array, layer) if array.ndim == 3 else array, arrays)


def _split(array, widths: Sequence[int]) -> list:
    starts = [sum(widths[:n]) for n in range(len(widths))]
    return [array[..., start : start + width] for start, width in zip(starts, widths, strict=True)]


def _dot(x, matrix):
    """x · matrix, operands in the dtype of x, sums and result in float32."""
    return lax.dot_general(
        x,
        matrix.astype(x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _drop(x, key, rate: float):
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))

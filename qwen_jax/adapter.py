"""A finished adapter put into a model: low-rank terms beside the projections, trained modules in their place."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.peft import Adapter
from pallas_kernels.dense_matmul import DenseTensor
from qwen_jax.adapted_linear import Term, adapt
from qwen_jax.linear import Linear, RMSNorm
from qwen_jax.loading import pack
from qwen_jax.model import Decoder
from qwen_jax.parallel_linear import RowParallelLinear
from qwen_jax.sharded_weights import ShardedWeights


def apply(decoder: Decoder, adapter: Adapter, weights, *, dtype: str, kernels: str = "auto") -> Decoder:
    """A decoder with the adapter in it; the base's arrays are shared.

    Args:
        decoder: made of `weights`.
        adapter: from `converters.peft.read`.
        weights: see `model.Weights`.
        dtype: that the terms are kept in.
        kernels: as the decoder's.
    """
    sharded = weights if isinstance(weights, ShardedWeights) else None
    new = jax.tree.map(lambda leaf: leaf, decoder)
    for number, block in enumerate(new.blocks):
        layers = range(block.first, block.first + block.count)
        terms = {}
        for module, (a_LIR, b_LRO, scale_L) in stacked(adapter, layers).items():
            arrays = a_LIR, b_LRO * scale_L[:, None, None]
            terms[module] = _placed(arrays, module, layers, block, sharded, dtype)
        block = adapt(block, terms)
        for name, norm in norms(block).items():
            if (scale_LD := _saved_norm(adapter.saved, layers, name, norm)) is not None:
                norm.scale = _whole(scale_LD, ("layers", "features"), sharded)
        new.blocks[number] = block
    if (scale_D := adapter.saved.get("final_norm.scale")) is not None:
        new.final_norm.scale = _whole(np.asarray(scale_D, np.float32), ("features",), sharded)
    head = None
    if (head_VD := adapter.saved.get("lm_head")) is not None:
        head = _table(head_VD, dtype, kernels, sharded)
    if (table_VD := adapter.saved.get("embedding")) is not None:
        if head is None and new.lm_head is None:
            head = new.embedding  # tied: the head stays the base's
        new.embedding = _table(table_VD, dtype, kernels, sharded)
    if head is not None:
        new.lm_head = nnx.data(head)
    return new


def stacked(adapter: Adapter, layers: range) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Low-rank terms of a block: module → (a [L, in, rank], b [L, rank, out], scale [L]), float32.

    Layers without a term get zeros, and lower ranks are filled up with zeros, both exact.
    """
    found: dict[str, dict[int, Any]] = {}
    for path, term in adapter.modules.items():
        _, layer, module = path.split(".", 2)
        if int(layer) in layers:
            found.setdefault(module, {})[int(layer) - layers.start] = term
    result = {}
    for module, terms in found.items():
        rank = max(len(term.a_RI) for term in terms.values())
        one = next(iter(terms.values()))
        a_LIR = np.zeros((len(layers), one.a_RI.shape[1], rank), np.float32)
        b_LRO = np.zeros((len(layers), rank, len(one.b_OR)), np.float32)
        scale_L = np.ones(len(layers), np.float32)
        for place, term in terms.items():
            own = len(term.a_RI)
            a_LIR[place, :, :own], b_LRO[place, :own], scale_L[place] = term.a_RI.T, term.b_OR.T, term.scale
        result[module] = a_LIR, b_LRO, scale_L
    return result


def norms(block) -> dict[str, RMSNorm]:
    """The normalisations of a block by the end of our path."""
    every = {
        "attention_norm": block.attention_norm,
        "mlp_norm": block.mlp_norm,
        "attention.query_norm": block.attention.query_norm,
        "attention.key_norm": block.attention.key_norm,
    }
    return {name: norm for name, norm in every.items() if norm is not None}


def cut(array: np.ndarray, index_N: np.ndarray, axis: int) -> np.ndarray:
    """These entries along an axis, zeros for −1."""
    taken = np.take(array, np.maximum(index_N, 0), axis)
    shape = [1] * array.ndim
    shape[axis] = len(index_N)
    return np.where((index_N >= 0).reshape(shape), taken, 0).astype(array.dtype)


def _placed(arrays, module: str, layers: range, block, sharded: ShardedWeights | None, dtype: str) -> Term:
    a_LIR, b_LRO = arrays
    if sharded is None:
        return Term(jnp.asarray(a_LIR, dtype), jnp.asarray(b_LRO, dtype))
    cuts = [sharded.low_rank_cuts(f"layers.{layer}.{module}") for layer in layers]
    put = sharded.placement.put

    def every(array, which: int, axis: int, number: int):
        pieces = []
        for layer, both in zip(array, cuts, strict=True):
            table = both[which]
            pieces.append(layer if table is None else cut(layer, table[number], axis))
        return np.stack(pieces).astype(jnp.dtype(dtype))

    fused = module.partition(".")[0] == "attention"
    linear = getattr(block.attention if fused else block.mlp, module.partition(".")[2], None)
    if isinstance(linear, RowParallelLinear):
        rows, columns = linear.axes
    else:
        rows, columns = "hidden", "heads" if fused else "mlp"
    return Term(
        put(lambda number: every(a_LIR, 0, 0, number), ("layers", rows, "private")),
        put(lambda number: every(b_LRO, 1, 1, number), ("layers", "private", columns)),
    )


def _saved_norm(saved: Mapping[str, np.ndarray], layers: range, name: str, norm: RMSNorm) -> np.ndarray | None:
    paths = [f"layers.{layer}.{name}.scale" for layer in layers]
    if not any(path in saved for path in paths):
        return None
    scale_LD = np.array(norm.scale, np.float32)
    for place, path in enumerate(paths):
        if path in saved:
            scale_LD[place] = saved[path]
    return scale_LD


def _whole(array: np.ndarray, names, sharded: ShardedWeights | None):
    return jnp.asarray(array) if sharded is None else sharded.placement.put(lambda number: array, names)


def _table(data_VD: np.ndarray, dtype: str, kernels: str, sharded: ShardedWeights | None) -> Linear:
    weight = DenseTensor(np.asarray(data_VD).astype(jnp.dtype(dtype)), dtype, data_VD.shape[1], "transposed")
    if sharded is not None:
        return sharded.table(weight)
    return Linear(pack(weight, kernels), axes=("hidden", "vocabulary"), kernels=kernels)

"""Random models of true dimensions in a second: made on the devices where they lie, the same numbers on one as on many.

An array's numbers depend on its name and place alone, whatever device makes them (`jax.random` is partitionable). The
arrays of a mesh are made as they lie there, one device's share behind the other; those of one device are the same
arrays put into its order.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.layout_mosaic_gpu import LAYOUT
from qwen_jax import peers
from qwen_jax.bench.random_numbers import scale
from qwen_jax.config import ModelConfig
from qwen_jax.linear import Linear
from qwen_jax.model import Decoder
from qwen_jax.parallel_linear import RowParallelLinear
from qwen_jax.plan.abstract import AbstractWeights, Storage
from qwen_jax.sharding import DATA, MODEL, Placement


class OneDevice(AbstractWeights):
    """Shapes as a single device holds them, without a mesh."""

    def linear(self, path, layers, axes) -> Linear:
        """See `model.Weights`."""
        return Linear(super().linear(path, layers, axes).weight, axes=axes, kernels=self.kernels)

    def _table(self, bits: int):
        axes, storage = ("hidden", "vocabulary"), dataclasses.replace(self.storage, bits=bits)
        weight = self._matrix(self.config.hidden_size, self.config.vocab_size, 64, axes, 0, storage)
        return Linear(weight, axes=axes, kernels=self.kernels)

    def _array(self, shape, dtype, names):
        whole = super()._array(shape, dtype, names)
        return jax.ShapeDtypeStruct(whole.shape, whole.dtype)


def shapes(config: ModelConfig, storage: Storage, mesh: Mesh | None, direct: bool = True, **options) -> Decoder:
    """A decoder whose arrays are shapes, but for the addresses of a mesh's memory; `options` go to `Decoder`.

    `direct`: False for sums of XLA's also where kernels may write to the other devices' memory.
    """
    if mesh is None:
        weights = OneDevice(config, storage, _abstract(1))
    else:
        weights = AbstractWeights(config, storage, mesh)
    decoder = Decoder(weights.config, weights, dtype=storage.dtype, **options)
    if mesh is not None:
        placement = Placement(mesh)
        found = peers.addresses(placement, config.hidden_size, storage.dtype)
        for linear in (linear for block in decoder.blocks for linear in (block.attention.output, block.mlp.down)):
            assert isinstance(linear, RowParallelLinear)
            linear.direct, linear.peers = direct and placement.direct, nnx.data(found)
    return decoder


def maker(config: ModelConfig, storage: Storage, mesh: Mesh | None, pieces: int):
    """A jitted function without arguments: the leaves of `shapes(config, storage, mesh)` in `jax.tree.leaves`' order.

    `pieces`: devices along "model" of the mesh whose numbers a single device shall have; the mesh's own on a mesh.
    """
    assert mesh is None or mesh.shape[MODEL] == pieces
    ours = shapes(config, storage, mesh)
    model = AbstractWeights(config, storage, _abstract(pieces) if mesh is None else mesh)
    split = Decoder(model.config, model, dtype=storage.dtype)
    assert all(head >= 0 for row in model.layout.query_table for head in row), "a device with empty heads"
    leaves = jax.tree.leaves(ours)
    found = {
        id(own): (path, theirs.shape, own.dtype, facts) for path, own, theirs, facts in _arrays(ours, split, config)
    }

    def make():
        made = []
        for leaf in leaves:
            if isinstance(leaf, jax.Array):  # addresses
                made.append(leaf)
                continue
            array = _make(*found[id(leaf)])
            made.append(array if mesh is not None else _whole(array, leaf.shape, pieces, found[id(leaf)][-1]))
            assert made[-1].shape == leaf.shape, (found[id(leaf)][0], made[-1].shape, leaf.shape)
        return made

    return jax.jit(make, out_shardings=None if mesh is None else [leaf.sharding for leaf in leaves])


@dataclasses.dataclass(frozen=True)
class _Facts:
    """How an array is made and put together.

    Attributes:
        kind: "bits", "uniform", "normal" or "ones".
        factor: what random numbers are multiplied by.
        join: "columns" (the parts of a fused projection on each device), "rows", or None: they lie in order.
        widths: columns of each part on a device of the mesh.
        whole: columns of each part on a single device; the shares together may go beyond.
        unit: columns that an entry of the last but one axis (packed) or of the last one (1) stands for.
        real: rows along axis 1 that exist, where the devices' shares go beyond; the others are zeros.
        zero: part whose columns are zeros.
    """

    kind: str
    factor: float = 1.0
    join: str | None = None
    widths: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    unit: int = 1
    real: int | None = None
    zero: int | None = None


def _abstract(devices: int) -> AbstractMesh:
    return AbstractMesh((1, devices), (DATA, MODEL))


def _arrays(ours: Decoder, split: Decoder, config: ModelConfig) -> Iterator[tuple[str, Any, Any, _Facts]]:
    """(path, shape on the mesh or device, shape as made, facts) of every array."""

    def matrix(path, own: Linear, theirs: Linear, join, widths=(), whole=(), inputs=None):
        weight, other = own.weight, theirs.weight
        if isinstance(weight, DenseTensor):
            assert isinstance(other, DenseTensor)
            # Tokens large beside what layers add, biases small: else every step gives the same token.
            size = 4.0 if path == "embedding" else config.hidden_size**-0.5
            yield path, weight.data, other.data, _Facts("normal", size)
            return
        assert isinstance(other, QuantizedTensor)
        assert weight.layout == other.layout == LAYOUT and weight.zeros is None
        assert weight.group_size == other.group_size, f"{path}: groups are cut between devices"
        groups = None if inputs is None else inputs // other.group_size
        factor = scale(inputs or config.hidden_size, weight.bits)
        yield path, weight.packed, other.packed, _Facts("bits", 1, join, widths, whole, 16)
        yield f"{path}.scales", weight.scales, other.scales, _Facts("uniform", factor, join, widths, whole, real=groups)
        if own.bias is not None:
            yield f"{path}.bias", own.bias, theirs.bias, _Facts("normal", 0.2, "columns", widths, whole, zero=1)

    for b, (mine, other) in enumerate(zip(ours.blocks, split.blocks, strict=True)):
        a, o = mine.attention, other.attention
        for path, own, theirs in (("qkv", a.qkv, o.qkv), ("gate_up", mine.mlp.gate_up, other.mlp.gate_up)):
            yield from matrix(f"{b}.{path}", own.parts[0], theirs.parts[0], "columns", theirs.sizes[0], own.sizes[0])
        heads = config.num_heads * config.head_dim
        yield from matrix(f"{b}.output", a.output, o.output, "rows", inputs=heads)
        yield from matrix(f"{b}.down", mine.mlp.down, other.mlp.down, "rows", inputs=config.intermediate_size)
        if a.key_bias is not None:
            yield f"{b}.key_bias", a.key_bias, o.key_bias, _Facts("normal")
        norms = [(mine.attention_norm, other.attention_norm), (mine.mlp_norm, other.mlp_norm)]
        norms += [(a.query_norm, o.query_norm), (a.key_norm, o.key_norm)] if a.query_norm is not None else []
        for own, theirs in norms:
            yield "norm", own.scale, theirs.scale, _Facts("ones")
    yield "norm", ours.final_norm.scale, split.final_norm.scale, _Facts("ones")
    yield from matrix("embedding", ours.embedding, split.embedding, None)
    if ours.lm_head is not None and split.lm_head is not None:
        yield from matrix("lm_head", ours.lm_head, split.lm_head, None)


def _make(path: str, shape, dtype, facts: _Facts):
    key = jax.random.key(zlib.crc32(path.encode()))
    if facts.kind == "ones":
        return jnp.ones(shape, dtype)
    if facts.kind == "bits":
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), jnp.int32)
    if facts.kind == "uniform":
        numbers = jax.random.uniform(key, shape, jnp.float32, 0.8, 1.2) * facts.factor
    else:
        numbers = jax.random.normal(key, shape, jnp.float32) * facts.factor
    if facts.real is not None:
        numbers = jnp.where(jnp.arange(shape[1])[None, :, None] < facts.real, numbers, 0)
    if facts.zero is not None:
        start = sum(facts.widths[: facts.zero])
        place = jnp.arange(shape[-1]) % sum(facts.widths)
        numbers = jnp.where((place >= start) & (place < start + facts.widths[facts.zero]), 0, numbers)
    return numbers.astype(dtype)


def _whole(array, shape, pieces: int, facts: _Facts):
    """One device's array from the shares of several, which lie one behind the other."""
    if facts.join == "columns":
        axis = 2 if facts.unit > 1 else array.ndim - 1
        shares = jnp.split(array, pieces, axis=1)
        parts, start = [], 0
        for width, whole in zip(facts.widths, facts.whole, strict=True):
            stop = start + width // facts.unit
            pieces_of_part = [jax.lax.slice_in_dim(share, start, stop, axis=axis) for share in shares]
            part = jnp.concatenate(pieces_of_part, axis=axis)
            parts.append(jax.lax.slice_in_dim(part, 0, whole // facts.unit, axis=axis))
            start = stop
        array = jnp.concatenate(parts, axis=axis)
    return array[tuple(slice(size) for size in shape)]

"""Parameters of the model from a checkpoint, each device of a mesh receiving its share and nothing else.

A module is read, cut on the host, and each piece sent to its devices, where it is packed for the kernel and written
into its place of a stack: the host holds one module, a device never more than its own share and one piece.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pallas_kernels.dense_matmul as dense
import pallas_kernels.quantized_matmul as quantized
from converters.huggingface import Checkpoint, Module
from pallas_kernels.chip import default_chip
from pallas_kernels.dense_matmul import DenseTensor, quantize_head
from pallas_kernels.exact_sums import unit_rows
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax import peers
from qwen_jax.linear import FusedLinear, Linear, RMSNorm
from qwen_jax.loading import CheckpointWeights, kept_dtype
from qwen_jax.parallel_linear import RowParallelLinear, VocabularyLinear
from qwen_jax.sharding import (
    SEQUENCE,
    Placement,
    head_columns,
    head_layout,
    local_config,
    row_multiples,
    split_rows,
    split_vocabulary,
    tensor_axes,
)
from qwen_jax.weight_cuts import common_group_size, concatenate, take_bias, take_columns, take_rows


class ShardedWeights(CheckpointWeights):
    """`model.Weights` read from a Hugging Face folder onto a mesh; the model made of it runs under `jax.shard_map`.

    Column-parallel: query, key, value, gate, up and head. Row-parallel: output and down. Act-order of `down` is applied
    to the columns of gate and up instead, so that rows sorted by group meet inputs of their own device.

    Attributes:
        config: of one device's share: its numbers of heads.
        whole_config: of the model.
        placement: the mesh.
        layout: which heads lie where along "model".
        peers: see `RowParallelLinear`.
        cache_axis: the mesh axis a cache's length is split over, or None.
    """

    def __init__(self, checkpoint: Checkpoint, mesh: Mesh, *, dtype: str, kernels: str = "auto", int8_head=False):
        super().__init__(checkpoint, dtype=dtype, kernels=kernels)
        self.placement, self.int8_head = Placement(mesh), int8_head
        config = self.whole_config = checkpoint.config
        self.layout = head_layout(config.num_heads, config.num_kv_heads, self.placement.model)
        self.cache_axis = SEQUENCE if self.placement.sequence > 1 else None
        self.config = local_config(config, self.layout)
        self.peers = peers.addresses(self.placement, config.hidden_size, dtype)

    def fused(self, path, outputs, layers, axes, separate_bias=None):
        """See `model.Weights`."""
        del outputs
        parts, sizes, separate = [], [], None
        for names, stored in self.matrices(layers.start, path):
            tensors, biases = ShardedStack(self.placement, len(layers), axes, self.kernels), []
            widths: tuple[int, ...] = ()
            for n, layer in enumerate(layers):
                columns = self._columns(path, layer)  # of each output, by place on the mesh
                widths = tuple(columns[name].shape[1] for name in names)
                by_module = [names] if len(stored) == 1 else [(name,) for name in names]
                pieces: dict[int, list] = {number: [] for number in self.placement.numbers}
                bias = []
                for module_name, inside in zip(stored, by_module, strict=True):
                    columns_NO = np.concatenate([columns[name] for name in inside], axis=1)
                    module, cut_NO = self._read(f"layers.{layer}.{path}.{module_name}", columns_NO=columns_NO)
                    for number, cuts in pieces.items():
                        cuts.append(take_columns(module.weight, cut_NO[number]))
                    bias.append(np.stack([take_bias(module.bias, columns_O) for columns_O in columns_NO]))
                    del module
                tensors.put(n, {number: self._kept(concatenate(cuts)) for number, cuts in pieces.items()})
                biases.append(np.concatenate(bias, axis=1))
            bias_LNO = np.stack(biases)
            if separate_bias in names:
                at = names.index(separate_bias)
                inside = slice(sum(widths[:at]), sum(widths[: at + 1]))
                separate = self._bias(bias_LNO[:, :, inside].copy(), axes[1])
                bias_LNO[:, :, inside] = 0
            parts.append(Linear(tensors.value, self._bias(bias_LNO, axes[1]), axes=axes, kernels=self.kernels))
            sizes.append(widths)
        return FusedLinear(parts, sizes), separate

    def linear(self, path, layers, axes) -> Linear:
        """See `model.Weights`; both projections of this kind are row-parallel."""
        tensors = ShardedStack(self.placement, len(layers), axes, self.kernels)
        biases, inputs, unit = [], [], None
        for n, layer in enumerate(layers):
            rows_NI, group_size = self._rows(path, layer)
            unit = self._unit(path, layer)
            module, cut_NI = self._read(f"layers.{layer}.{path}", rows_NI=rows_NI)
            weight = module.weight
            if isinstance(weight, QuantizedTensor) and weight.permutation is not None:
                if path == "attention.output":
                    order = self.checkpoint.read_permutation(f"layers.{layer}.{path}")
                    assert order is not None
                    inputs.append(self._gathered_places(order)[rows_NI])
                weight = dataclasses.replace(weight, permutation=None)
            cuts = {number: take_rows(weight, cut_NI[number], group_size) for number in self.placement.numbers}
            biases.append(take_bias(module.bias, np.arange(weight.out_features)))
            del module, weight
            tensors.put(n, {number: self._kept(cut) for number, cut in cuts.items()})
        bias_LO, gathered = np.stack(biases), None
        if inputs:
            inputs_LNI = np.stack(inputs).astype(np.int32)
            gathered = self.placement.put(lambda number: inputs_LNI[:, number], ("layers", axes[0]))
        bias = self._replicated(bias_LO, ("layers", axes[1])) if bias_LO.any() else None
        return RowParallelLinear(
            tensors.value,
            bias,
            axis=self.placement.axis(axes[0]),
            direct=self.placement.direct,
            peers=self.peers,
            inputs=gathered,
            unit=unit,
            axes=axes,
            kernels=self.kernels,
        )

    def norm(self, path, layers) -> RMSNorm:
        """See `model.Weights`."""
        if layers is None:
            scale, names = self.checkpoint.read_vector(f"{path}.scale"), ("features",)
        else:
            scale = np.stack([self.checkpoint.read_vector(f"layers.{layer}.{path}.scale") for layer in layers])
            names = ("layers", "features")
        scale = self._replicated(np.asarray(scale, np.float32), names)
        return RMSNorm(scale, self.config.norm_epsilon, exact=self.kernels == "exact")

    def embedding(self) -> VocabularyLinear:
        """See `model.Weights`."""
        return self._vocabulary("embedding")

    def head(self) -> VocabularyLinear | None:
        """See `model.Weights`."""
        tied = self.config.tie_word_embeddings
        if tied and not self.int8_head:
            return None
        return self._vocabulary("embedding" if tied else "lm_head", head=True)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def low_rank_cuts(self, path: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Which inputs and outputs of a projection each device has: (rows or None, columns or None), None for all.

        Int [devices, length] in the projection's own order ("layers.0.attention.query"; the first generation's qkv is
        one), −1 an empty one; for low-rank terms that run beside the projection.
        """
        _, layer, module = path.split(".", 2)
        if module == "attention.output":  # act-order gathers inputs inside the projection: here they lie as heads do
            return self._head_columns(self.layout.query_table), None
        if module == "mlp.down":
            return self._columns("mlp", int(layer))["gate"], None
        fused, name = module.split(".")
        columns = self._columns(fused, int(layer))
        return None, columns[name] if name in columns else np.concatenate(list(columns.values()), axis=1)

    # -- who holds what ------------------------------------------------------------------------------------------------

    def _columns(self, path: str, layer: int) -> dict[str, np.ndarray]:
        """For each output of a fused projection the columns [devices, width] of its stored module, −1 an empty one."""
        config = self.whole_config
        if path == "mlp":
            rows_NI, _ = self._rows("mlp.down", layer)
            down = f"layers.{layer}.mlp.down"
            permutation = self.checkpoint.read_permutation(down) if self.checkpoint.spec(down).has_permutation else None
            columns_NF = rows_NI if permutation is None else np.where(rows_NI < 0, -1, permutation[rows_NI])
            return {"gate": columns_NF, "up": columns_NF}
        query, key = (self._head_columns(table) for table in (self.layout.query_table, self.layout.kv_table))
        key_start = value_start = 0
        if len(self._stored(path)) == 1:  # side by side in one module
            key_start = config.num_heads * config.head_dim
            value_start = key_start + config.num_kv_heads * config.head_dim
        moved = {"key": np.where(key < 0, -1, key + key_start), "value": np.where(key < 0, -1, key + value_start)}
        return {"query": query, **moved}

    def _rows(self, path: str, layer: int) -> tuple[np.ndarray, int | None]:
        """Stored rows [devices, length] of a row-parallel module, −1 an empty one, and the group size they need."""
        item = self.checkpoint.spec(f"layers.{layer}.{path}")
        rows_NI, group_size = _row_table(
            self.layout, self.placement.parts, path, item.in_features, item.group_size, item.has_permutation
        )
        return (rows_NI if path == "mlp.down" else self.placement.each(rows_NI)), group_size

    def _unit(self, path: str, layer: int) -> int | None:
        """For exact sums: rows of a row-parallel module that no mesh cuts, the same on all of them."""
        if self.kernels != "exact":
            return None
        item = self.checkpoint.spec(f"layers.{layer}.{path}")
        if path == "attention.output" and not item.has_permutation:
            return unit_rows(self.config.head_dim)
        return unit_rows(row_multiples(item.in_features, item.group_size)[-1])

    def _head_columns(self, table) -> np.ndarray:
        return self.placement.each(head_columns(table, self.whole_config.head_dim))

    def _gathered_places(self, permutation: np.ndarray) -> np.ndarray:
        """Where each stored row finds its input in the devices' attention outputs, laid one behind the other."""
        columns = head_columns(self.layout.query_table, self.whole_config.head_dim).reshape(-1)
        place = np.zeros(len(permutation), np.int32)
        place[columns[columns >= 0]] = np.flatnonzero(columns >= 0)
        return place[permutation]

    # -- placing -------------------------------------------------------------------------------------------------------

    def _read(self, path: str, *, rows_NI=None, columns_NO=None) -> tuple[Module, np.ndarray]:
        """A module with what this process's devices need of it, and where in that the wanted rows or columns are."""
        wanted = rows_NI if columns_NO is None else columns_NO
        assert wanted is not None
        item = self.checkpoint.spec(path)
        if len(self.placement.numbers) == self.placement.parts:
            return self.checkpoint.read(path), wanted
        unit, size = 1, item.out_features
        if rows_NI is not None:
            size = item.in_features
            if item.group_size is not None:  # 32 rows: whole words for any bits
                unit = 32 if item.group_size >= size else math.lcm(item.group_size, 32)
        here = wanted[self.placement.numbers]
        blocks = np.unique(here[here >= 0] // unit)
        if len(blocks) == 0:  # empty heads alone: something must be read, and is not used
            blocks = np.zeros(1, int)
        ends = np.flatnonzero(np.diff(blocks) > 1)
        starts, stops = blocks[[0, *(ends + 1)]] * unit, (blocks[[*ends, -1]] + 1) * unit
        runs = tuple(slice(int(a), min(int(b), size)) for a, b in zip(starts, stops, strict=True))
        places = np.concatenate([np.arange(run.start, run.stop) for run in runs])
        cut = np.where(wanted < 0, -1, np.searchsorted(places, wanted))
        module = self.checkpoint.read(path, **{"columns" if rows_NI is None else "rows": runs})
        return module, cut

    def _vocabulary(self, path: str, head: bool = False) -> VocabularyLinear:
        ids_NV = split_vocabulary(self.config.vocab_size, self.placement.parts)
        module, cut_NV = self._read(path, columns_NO=ids_NV)
        weight, bias = module.weight, module.bias
        cuts: dict[int, Any] = {}
        for number in self.placement.numbers:
            cuts[number] = self._kept(take_columns(weight, cut_NV[number]))
        if head and self.int8_head and isinstance(weight, DenseTensor):
            cuts = {number: quantize_head(cut) for number, cut in cuts.items()}
        del module, weight
        if bias is not None:
            bias_NV = np.stack([take_bias(bias, ids_V) for ids_V in ids_NV])
            bias = self.placement.put(lambda number: bias_NV[number], ("vocabulary",))
        return self._vocabulary_linear(cuts, bias)

    def table(self, weight: DenseTensor) -> VocabularyLinear:
        """A whole token table [D, V] that does not come from the checkpoint, each device holding its ids."""
        ids_NV = split_vocabulary(self.config.vocab_size, self.placement.parts)
        cuts = {number: self._kept(take_columns(weight, ids_NV[number])) for number in self.placement.numbers}
        return self._vocabulary_linear(cuts, None)

    def _vocabulary_linear(self, cuts: dict[int, Any], bias) -> VocabularyLinear:
        axes = ("hidden", "vocabulary")
        tensor = place(self.placement, cuts, axes, self.kernels)
        return VocabularyLinear(
            tensor,
            bias,
            axis=self.placement.axis("vocabulary"),
            vocab_size=self.config.vocab_size,
            devices=self.placement.parts,
            axes=axes,
            kernels=self.kernels,
        )

    def _kept(self, weight):
        """The dtype a float weight is kept in."""
        if not isinstance(weight, DenseTensor):
            return weight
        dtype = kept_dtype(weight.dtype, self.dtype)
        return dataclasses.replace(weight, data=weight.data.astype(dtype, copy=False), dtype=dtype)

    def _bias(self, bias_LNO: np.ndarray, axis: str):
        if not bias_LNO.any():
            return None
        return self.placement.put(lambda number: bias_LNO[:, number], ("layers", axis))

    def _replicated(self, array: np.ndarray, names):
        return self.placement.put(lambda number: array, names)


@functools.cache
def _row_table(layout, parts: int, path: str, in_features: int, group_size: int | None, permuted: bool):
    if path == "attention.output" and not permuted:
        rows_NI = head_columns(layout.query_table, in_features // _heads(layout))
    else:
        rows_NI = split_rows(in_features, group_size, parts if path == "mlp.down" else layout.devices)
    return rows_NI, None if group_size is None else common_group_size(rows_NI, group_size)


def _heads(layout) -> int:
    return sum(head >= 0 for table in layout.query_table for head in table)


# -- packing on the devices ------------------------------------------------------------------------------------------


class ShardedStack:
    """Alike matrices collected along a leading axis, each device holding its pieces of them; allocated once."""

    def __init__(self, placement: Placement, count: int, axes, kernels: str):
        self.placement, self.count, self.axes, self.kernels = placement, count, axes, kernels
        self.value: Any = None

    def put(self, index: int, cuts: dict[int, QuantizedTensor | DenseTensor]) -> None:
        """Writes one matrix, given as its piece for each share of `placement`."""
        piece = place(self.placement, cuts, self.axes, self.kernels)
        if self.value is None:
            stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.count, *leaf.shape), leaf.dtype), piece)
            shardings = _shardings(self.placement, tensor_axes(stacked, self.axes))
            self.value = jax.tree.map(
                lambda leaf, sharding: _zeros(leaf.shape, leaf.dtype, sharding)(), stacked, shardings
            )
        whole, part = (_specs(self.placement, tensor_axes(tensor, self.axes)) for tensor in (self.value, piece))
        self.value = _write(self.value, piece, np.int32(index), self.placement.mesh, whole, part)


def place(placement: Placement, cuts: dict[int, QuantizedTensor | DenseTensor], axes, kernels: str):
    """One matrix on the mesh, each piece packed on its own devices in the layout of the kernel that will run it."""
    first = cuts[placement.numbers[0]]
    names = tensor_axes(first, axes)
    module = quantized if isinstance(first, QuantizedTensor) else dense
    packed = jax.eval_shape(functools.partial(module.prepack, kernels=kernels), first)
    raw = placement.put_tree(cuts, names)
    if packed.layout == first.layout:
        return raw
    before, after = (_specs(placement, each) for each in (names, tensor_axes(packed, axes)))
    return _prepack(raw, module, kernels, default_chip(), placement.mesh, before, after)


def _specs(placement: Placement, names):
    """A tree of PartitionSpecs, hashable, from one of names."""
    return jax.tree.map(placement.spec, names, is_leaf=lambda node: isinstance(node, tuple))


def _shardings(placement: Placement, names):
    return jax.tree.map(placement.sharding, names, is_leaf=lambda node: isinstance(node, tuple))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _prepack(weight, module, kernels, chip, mesh, before, after):
    local = functools.partial(module.prepack, kernels=kernels, chip=chip)
    return jax.shard_map(local, mesh=mesh, in_specs=(before,), out_specs=after, check_vma=False)(weight)


@functools.cache
def _zeros(shape, dtype, sharding):
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _write(stack, tensor, index, mesh, whole, part):
    def local(stack, tensor, index):
        return jax.tree.map(lambda buffer, leaf: buffer.at[index].set(leaf), stack, tensor)

    shard = jax.shard_map(local, mesh=mesh, in_specs=(whole, part, P()), out_specs=whole, check_vma=False)
    return shard(stack, tensor, index)

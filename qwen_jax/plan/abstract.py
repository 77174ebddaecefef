"""The shapes of a model's parameters on a mesh, without an array: what programs are compiled and counted with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import AbstractMesh, Mesh, NamedSharding

import pallas_kernels.dense_matmul as dense
import pallas_kernels.quantized_matmul as quantized
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.config import ModelConfig
from qwen_jax.linear import FusedLinear, Linear, RMSNorm
from qwen_jax.parallel_linear import RowParallelLinear, VocabularyLinear
from qwen_jax.sharding import (
    MODEL,
    SEQUENCE,
    axis_of,
    head_columns,
    head_layout,
    local_config,
    pieces_along,
    spec,
    split_rows,
    split_vocabulary,
    tensor_axes,
)
from qwen_jax.weight_cuts import common_group_size


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the weights are kept.

    Attributes:
        bits: of the layers' projections: 4 or 8, or 16 for float.
        group_size: inputs that share a scale, −1 for all.
        zeros: whether zero-points are stored.
        dtype: of activations and float weights.
        scales: dtype of the scales, in the file.
        head_bits: 16, or 8 for a rounded output head.
    """

    bits: int = 4
    group_size: int = 128
    zeros: bool = False
    dtype: str = "bfloat16"
    scales: str = "float16"
    head_bits: int = 16


class AbstractWeights:
    """`model.Weights` of ShapeDtypeStructs with shardings; as `ShardedWeights` would place a checkpoint.

    Args:
        config: of the model.
        storage: of its weights.
        mesh: axes "data", "model" and, if wanted, "sequence"; its devices need not exist.
        kernels: as in `from_pretrained`; layouts are those of `default_chip()`.
    """

    def __init__(self, config: ModelConfig, storage: Storage, mesh: Mesh | AbstractMesh, kernels: str = "auto"):
        self.whole_config, self.storage, self.mesh, self.kernels = config, storage, mesh, kernels
        self.parts = mesh.shape[MODEL] * mesh.shape.get(SEQUENCE, 1)
        self.cache_axis = SEQUENCE if mesh.shape.get(SEQUENCE, 1) > 1 else None
        self.layout = head_layout(config.num_heads, config.num_kv_heads, mesh.shape[MODEL])
        self.config = local_config(config, self.layout)

    def blocks(self) -> list[range]:
        """See `model.Weights`; layers differ in nothing but their window."""
        starts = [0]
        sliding = self.config.sliding_layers
        starts += [layer for layer in range(1, self.config.num_layers) if sliding[layer] != sliding[layer - 1]]
        return [range(*pair) for pair in zip(starts, [*starts[1:], self.config.num_layers], strict=True)]

    def fused(self, path, outputs, layers, axes, separate_bias=None):
        """See `model.Weights`."""
        del outputs
        if path == "attention":
            size = self.config.head_dim
            key = self.layout.kv_heads * size
            widths: tuple[int, ...] = (self.layout.heads * size, key, key)
        else:
            widths = (self._inner_rows().shape[1],) * 2
        weight = self._matrix(self.config.hidden_size, sum(widths), self.storage.group_size, axes, len(layers))
        bias = separate = None
        if path == "attention" and self.config.attention_bias:
            assert separate_bias == "key"
            bias = self._array((len(layers), sum(widths)), "float32", ("layers", axes[1]))
            separate = self._array((len(layers), widths[1]), "float32", ("layers", axes[1]))
        return FusedLinear([Linear(weight, bias, axes=axes, kernels=self.kernels)], [widths]), separate

    def linear(self, path, layers, axes) -> Linear:
        """See `model.Weights`; both projections of this kind are row-parallel."""
        if path == "attention.output":
            rows_NI = head_columns(self.layout.query_table, self.config.head_dim)
            whole = self.whole_config.num_heads * self.config.head_dim
        else:
            rows_NI, whole = self._inner_rows(), self.config.intermediate_size
        group_size = _group_size(self.storage, whole)
        if group_size is not None:
            group_size = common_group_size(rows_NI, group_size)
        weight = self._matrix(rows_NI.shape[1], self.config.hidden_size, group_size, axes, len(layers))
        return RowParallelLinear(weight, None, axis=self._axis(axes[0]), axes=axes, kernels=self.kernels)

    def norm(self, path, layers) -> RMSNorm:
        """See `model.Weights`."""
        width = self.config.head_dim if path.endswith(("query_norm", "key_norm")) else self.config.hidden_size
        names = ("features",) if layers is None else ("layers", "features")
        shape = (width,) if layers is None else (len(layers), width)
        return RMSNorm(self._array(shape, "float32", names), self.config.norm_epsilon)

    def embedding(self) -> VocabularyLinear:
        """See `model.Weights`."""
        return self._table(16)

    def head(self) -> VocabularyLinear | None:
        """See `model.Weights`."""
        tied = self.config.tie_word_embeddings
        return None if tied and self.storage.head_bits == 16 else self._table(self.storage.head_bits)

    def _inner_rows(self) -> np.ndarray:
        size = self.config.intermediate_size
        return split_rows(size, _group_size(self.storage, size), self.parts)

    def _table(self, bits: int) -> VocabularyLinear:
        width = split_vocabulary(self.config.vocab_size, self.parts).shape[1]
        axes = ("hidden", "vocabulary")
        storage = dataclasses.replace(self.storage, bits=bits, zeros=False, scales="bfloat16")
        weight = self._matrix(self.config.hidden_size, width, 64, axes, 0, storage)
        return VocabularyLinear(
            weight,
            axis=self._axis("vocabulary"),
            vocab_size=self.config.vocab_size,
            devices=self.parts,
            axes=axes,
            kernels=self.kernels,
        )

    def _matrix(self, inputs: int, outputs: int, group_size, axes, layers: int, storage: Storage | None = None):
        """The stack of all devices' pieces, each [inputs, outputs] in the layout of its kernel."""
        piece = _piece(storage or self.storage, inputs, outputs, group_size)
        module = quantized if isinstance(piece, QuantizedTensor) else dense
        piece = jax.eval_shape(functools.partial(module.prepack, kernels=self.kernels), piece)
        stack = (layers,) if layers else ()
        piece = jax.tree.map(lambda leaf: ShapeDtypeStruct((*stack, *leaf.shape), leaf.dtype), piece)
        return jax.tree.map(
            lambda leaf, names: self._array(leaf.shape, leaf.dtype, names), piece, tensor_axes(piece, axes)
        )

    def _array(self, shape, dtype, names) -> ShapeDtypeStruct:
        """The global array of which a device's piece has this shape."""
        whole = [size * pieces_along(name, self.mesh) for size, name in zip(shape, names, strict=True)]
        sharding = NamedSharding(self.mesh, spec(names, self.mesh.axis_names))
        return ShapeDtypeStruct(tuple(whole), jnp.dtype(dtype), sharding=sharding)

    def _axis(self, name: str) -> tuple[str, ...] | str:
        found = axis_of(name, self.mesh.axis_names)
        assert found is not None, name
        return found


def _group_size(storage: Storage, inputs: int) -> int | None:
    if storage.bits == 16:
        return None
    return inputs if storage.group_size == -1 else storage.group_size


def _piece(storage: Storage, inputs: int, outputs: int, group_size) -> QuantizedTensor | DenseTensor:
    """One device's matrix as the file holds it."""
    if storage.bits == 16:
        dtype = storage.dtype
        return DenseTensor(ShapeDtypeStruct((outputs, inputs), jnp.dtype(dtype)), dtype, inputs, "transposed")
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    return QuantizedTensor(
        ShapeDtypeStruct((-(-inputs * storage.bits // 32), outputs), jnp.int32),
        ShapeDtypeStruct((groups, outputs), jnp.dtype(storage.scales)),
        ShapeDtypeStruct((groups, outputs), jnp.uint8) if storage.zeros else None,
        None,
        storage.bits,
        size,
        inputs,
    )


def bytes_of_a_device(tree) -> int:
    """Bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )

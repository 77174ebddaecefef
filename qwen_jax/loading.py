"""Parameters of the model from a checkpoint: fused where parts are alike, stacked over layers, packed for the kernel.

Weights go to the device one module at a time, each layer written into its place of a stack that is allocated once, so
the host holds one module beside what the file system caches.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np

import pallas_kernels.dense_matmul as dense
import pallas_kernels.quantized_matmul as quantized
from converters.huggingface import Checkpoint, ModuleSpec
from pallas_kernels.chip import default_chip
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.linear import FusedLinear, Linear, RMSNorm

FUSED = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}


class CheckpointWeights:
    """`model.Weights` read from a Hugging Face folder."""

    cache_axis: str | None = None

    def __init__(self, checkpoint: Checkpoint, *, dtype: str, kernels: str = "auto", prepack: bool = True):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.dtype, self.kernels, self.prepack = dtype, kernels, prepack

    def blocks(self) -> list[range]:
        """Runs of consecutive layers with the same kinds of weights, fused in the same way."""
        likeness = [self._likeness(layer) for layer in range(self.config.num_layers)]
        starts = [n for n in range(len(likeness)) if n == 0 or likeness[n] != likeness[n - 1]]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(likeness)], strict=True)]

    def _likeness(self, layer: int):
        # A permutation's content and the presence of a bias may differ from layer to layer: both are stacked as data.
        def kind(spec: ModuleSpec):
            return dataclasses.replace(spec, permutation_digest=None, has_bias=False)

        groups = [self.matrices(layer, path) for path in FUSED]
        modules = [f"attention.{name}" for name in self._stored("attention")] + ["attention.output"]
        modules += ["mlp.gate", "mlp.up", "mlp.down"]
        kinds = [kind(self.checkpoint.spec(f"layers.{layer}.{module}")) for module in modules]
        return groups, kinds, self.config.sliding_layers[layer]

    def _stored(self, path: str) -> tuple[str, ...]:
        """The modules of a fused projection as the file holds them: Qwen v1's query, key and value are one."""
        return ("qkv",) if path == "attention" and self.config.family == "qwen" else FUSED[path]

    def matrices(self, layer: int, path: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """The matrices of a fused projection: (outputs side by side in it, the file's modules that make it) of each."""
        stored = self._stored(path)
        if stored != FUSED[path]:
            return [(FUSED[path], stored)]
        groups: list[tuple[str, ...]] = []
        last = None
        for name in stored:
            spec = self.checkpoint.spec(f"layers.{layer}.{path}.{name}")
            alike = dataclasses.replace(spec, out_features=0, has_bias=False)
            if alike == last:
                groups[-1] += (name,)
            else:
                groups.append((name,))
            last = alike
        return [(names, names) for names in groups]

    def fused(self, path, outputs, layers, axes, separate_bias=None):
        """See `model.Weights`."""
        parts, sizes, separate = [], [], None
        for names, stored in self.matrices(layers.start, path):
            widths = tuple(outputs[name] for name in names)
            tensors, biases = Stack(len(layers)), []
            for n, layer in enumerate(layers):
                modules = [self.checkpoint.read(f"layers.{layer}.{path}.{name}") for name in stored]
                tensors.put(n, self._pack(_concatenate([module.weight for module in modules])))
                biases.append(
                    np.concatenate(
                        [
                            np.zeros(module.weight.out_features, np.float32)
                            if module.bias is None
                            else np.asarray(module.bias, np.float32)
                            for module in modules
                        ]
                    )
                )
            bias = np.stack(biases)
            if separate_bias in names:
                at = names.index(separate_bias)
                columns = slice(sum(widths[:at]), sum(widths[: at + 1]))
                # A copy: JAX may keep a view of NumPy's memory, and the next line writes to it.
                separate = _array_unless_zero(bias[:, columns].copy())
                bias[:, columns] = 0
            parts.append(Linear(tensors.value, _array_unless_zero(bias), axes=axes, kernels=self.kernels))
            sizes.append(widths)
        return FusedLinear(parts, sizes), separate

    def linear(self, path, layers, axes) -> Linear:
        """See `model.Weights`."""
        tensors, biases = Stack(len(layers)), []
        for n, layer in enumerate(layers):
            module = self.checkpoint.read(f"layers.{layer}.{path}")
            tensors.put(n, self._pack(module.weight))
            biases.append(np.zeros(module.weight.out_features) if module.bias is None else module.bias)
        bias = _array_unless_zero(np.stack(biases).astype(np.float32))
        return Linear(tensors.value, bias, axes=axes, kernels=self.kernels)

    def norm(self, path, layers) -> RMSNorm:
        """See `model.Weights`."""
        if layers is None:
            scale = self.checkpoint.read_vector(f"{path}.scale")
        else:
            scale = np.stack([self.checkpoint.read_vector(f"layers.{layer}.{path}.scale") for layer in layers])
        return RMSNorm(jnp.asarray(scale, jnp.float32), self.config.norm_epsilon)

    def embedding(self) -> Linear:
        """See `model.Weights`."""
        weight = self._pack(self.checkpoint.read("embedding").weight)
        return Linear(weight, axes=("hidden", "vocabulary"), kernels=self.kernels)

    def head(self) -> Linear | None:
        """See `model.Weights`."""
        if self.config.tie_word_embeddings:
            return None
        module = self.checkpoint.read("lm_head")
        bias = None if module.bias is None else jnp.asarray(module.bias, jnp.float32)
        return Linear(self._pack(module.weight), bias, axes=("hidden", "vocabulary"), kernels=self.kernels)

    def _pack(self, weight: QuantizedTensor | DenseTensor):
        """One matrix, on the device, in the kernel's layout and the dtype it is kept in."""
        if isinstance(weight, DenseTensor):
            dtype = kept_dtype(weight.dtype, self.dtype)
            weight = DenseTensor(
                np.asarray(weight.data).astype(dtype, copy=False), dtype, weight.in_features, weight.layout
            )
        return pack(weight, self.kernels) if self.prepack else jax.tree.map(jnp.asarray, weight)


def pack(weight: QuantizedTensor | DenseTensor, kernels: str = "auto"):
    """One matrix in the layout of the kernel that will run it."""
    module = quantized if isinstance(weight, QuantizedTensor) else dense
    return _prepack(jax.tree.map(jnp.asarray, weight), module, kernels, default_chip())


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _prepack(weight, module, kernels, chip):
    return module.prepack(weight, kernels, chip)


def kept_dtype(stored: str, wanted: str) -> str:
    """The dtype a float weight is kept in: the wanted one, or the file's 16 bits where float32 gains nothing."""
    return stored if wanted == "float32" and np.dtype(stored).itemsize == 2 else wanted


def _array_unless_zero(array: np.ndarray):
    return jnp.asarray(array) if array.any() else None


def _concatenate(weights: list):
    """Matrices with the same inputs, side by side along `out`."""
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    if isinstance(first, DenseTensor):
        data = np.concatenate([weight.data for weight in weights], axis=-2)  # "transposed": [out, in]
        return dataclasses.replace(first, data=data)
    return dataclasses.replace(
        first,
        packed=np.concatenate([weight.packed for weight in weights], axis=-1),
        scales=np.concatenate([weight.scales for weight in weights], axis=-1),
        zeros=None if first.zeros is None else np.concatenate([weight.zeros for weight in weights], axis=-1),
    )


class Stack:
    """Alike matrices collected along a leading axis, on the device, allocated once."""

    def __init__(self, count: int):
        self.count = count
        self.value: Any = None

    def put(self, index: int, tensor):
        if self.value is None:
            self.value = jax.tree.map(lambda leaf: jnp.zeros((self.count, *leaf.shape), leaf.dtype), tensor)
        self.value = _write(self.value, tensor, index)


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack, tensor, index):
    return jax.tree.map(lambda buffer, leaf: buffer.at[index].set(leaf), stack, tensor)

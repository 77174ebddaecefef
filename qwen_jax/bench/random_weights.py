"""Random parameters of any dimensions, made on the device, packed as a checkpoint's would be."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.bench.random_numbers import scale
from qwen_jax.config import ModelConfig
from qwen_jax.linear import FusedLinear, Linear, RMSNorm
from qwen_jax.loading import Stack, pack


class RandomWeights:
    """`model.Weights` without a checkpoint.

    Args:
        config: the architecture.
        bits: 16 for float weights, else those of the layers' projections (embedding and head stay 16-bit).
        group_size: rows a scale.
        dtype: of activations and float weights.
        kernels: as in `from_pretrained`.
        seed: of everything.
        lm_head: "int8" for a head of 8 bits.
    """

    cache_axis: str | None = None

    def __init__(
        self,
        config: ModelConfig,
        *,
        bits=4,
        group_size=128,
        dtype="bfloat16",
        kernels="auto",
        seed=0,
        lm_head: str | None = None,
    ):
        if lm_head == "int8" and config.tie_word_embeddings:
            raise ValueError('lm_head="int8": this model\'s head is its embedding, which stays as it is. Leave it out.')
        self.config, self.bits, self.group_size, self.lm_head = config, bits, group_size, lm_head
        self.dtype, self.kernels = dtype, kernels
        self._key = jax.random.key(seed)

    def blocks(self) -> list[range]:
        """See `model.Weights`."""
        return [range(self.config.num_layers)]

    def fused(self, path, outputs, layers, axes, separate_bias=None):
        """See `model.Weights`."""
        config, widths = self.config, tuple(outputs.values())
        part = self._linear(config.hidden_size, sum(widths), len(layers), axes)
        separate = None
        if path == "attention" and config.attention_bias:
            bias = jax.random.normal(self._next(), (len(layers), sum(widths)), jnp.float32)
            names = list(outputs)
            start = sum(widths[: names.index(separate_bias)])
            stop = start + outputs[separate_bias]
            separate, part.bias = bias[:, start:stop], bias.at[:, start:stop].set(0)
        return FusedLinear([part], [widths]), separate

    def linear(self, path, layers, axes) -> Linear:
        """See `model.Weights`."""
        config = self.config
        inputs = config.intermediate_size if path == "mlp.down" else config.num_heads * config.head_dim
        return self._linear(inputs, config.hidden_size, len(layers), axes)

    def norm(self, path, layers) -> RMSNorm:
        """See `model.Weights`."""
        width = self.config.head_dim if path.endswith(("query_norm", "key_norm")) else self.config.hidden_size
        return RMSNorm(jnp.ones((width,) if layers is None else (len(layers), width)), self.config.norm_epsilon)

    def embedding(self) -> Linear:
        """See `model.Weights`."""
        # Both tables first, and the head before the embedding: what making them takes is then below the peak.
        self._head = None if self.config.tie_word_embeddings else self._table(self.lm_head)
        return self._table()

    def head(self) -> Linear | None:
        """See `model.Weights`; made with the embedding."""
        return self._head

    def _next(self):
        self._key, key = jax.random.split(self._key)
        return key

    def _table(self, form: str | None = None) -> Linear:
        rows, width = self.config.vocab_size, self.config.hidden_size
        if form == "int8":  # as `quantize_head` rounds one
            weight = quantized(self._next(), width, rows, 8, 64, "bfloat16")
        else:
            weight = dense(self._next(), (rows, width), self.dtype)
        weight = pack(weight, self.kernels)
        return Linear(weight, axes=("hidden", "vocabulary"), kernels=self.kernels)

    def _linear(self, inputs: int, outputs: int, count: int, axes) -> Linear:
        stack = Stack(count)
        for layer in range(count):
            if self.bits == 16:
                weight = dense(self._next(), (outputs, inputs), self.dtype)
            else:
                weight = quantized(self._next(), inputs, outputs, self.bits, self.group_size, self.dtype)
            stack.put(layer, pack(weight, self.kernels))
        return Linear(stack.value, axes=axes, kernels=self.kernels)


def dense(key, shape, dtype) -> DenseTensor:
    """A random weight in layout "transposed": shape is (out, in)."""
    rows, columns = shape
    # Some rows at a time, in place: the generator's temporaries of a table would be larger than small models.
    step = next(size for size in range(max(1, min(rows, 2**23 // columns)), 0, -1) if rows % size == 0)
    step = step if step >= 64 else rows
    data = jnp.zeros(shape, dtype)
    for start, one in zip(range(0, rows, step), jax.random.split(key, rows // step), strict=True):
        data = _fill(data, one, start, step)
    return DenseTensor(data, dtype, columns, "transposed")


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _fill(data, key, start, step):
    values = jax.random.normal(key, (step, data.shape[1]), jnp.float32) / math.sqrt(data.shape[1])
    return jax.lax.dynamic_update_slice_in_dim(data, values.astype(data.dtype), start, 0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def quantized(key, inputs, outputs, bits, group_size, dtype) -> QuantizedTensor:
    """A random symmetric weight [in, out] in layout "gptq"; group_size -1: one group."""
    size = inputs if group_size == -1 else group_size
    words, groups = -(-inputs * bits // 32), -(-inputs // size)
    packed = jax.lax.bitcast_convert_type(jax.random.bits(key, (words, outputs), jnp.uint32), jnp.int32)
    scales = scale(inputs, bits) * jax.random.uniform(key, (groups, outputs), jnp.float32, 0.8, 1.2)
    return QuantizedTensor(packed, scales.astype(dtype), None, None, bits, size, inputs)

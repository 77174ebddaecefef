"""One decoder layer for calibration: the model's own norms, attention and MLP, stopped in front of each projection."""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from converters import names
from converters.huggingface import Checkpoint
from pallas_kernels.dense_matmul import DenseTensor
from qwen_jax.config import ModelConfig
from qwen_jax.linear import FusedLinear, Linear, RMSNorm
from qwen_jax.model import DecoderLayer, Step, Weights
from qwen_jax.rotary import dynamic_ntk_alpha, rotary

OUTPUTS = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}


@dataclasses.dataclass(frozen=True)
class Projection:
    """One matrix of the layer as the file holds it.

    Attributes:
        weight_IO: logical [in, out].
        bias: [out], or None.
    """

    weight_IO: jax.Array
    bias: np.ndarray | None


class Layer:
    """A decoder layer whose projections can be replaced one after the other.

    Attributes:
        projections: by our path within the layer ("attention.query", …, "mlp.down"; Qwen v1: "attention.qkv").
    """

    cache_axis: str | None = None  # there is no cache

    def __init__(self, config: ModelConfig, number: int, projections: dict[str, Projection], norms: dict, dtype: str):
        # Every layer is built as layer 0 of a model of one, so that alike layers share compiled programs.
        sliding = (config.sliding_layers[number],)
        self.config = dataclasses.replace(config, num_layers=1, sliding_layers=sliding)
        self.projections = dict(projections)
        self._norms, self._dtype = norms, dtype
        self._block = None

    @classmethod
    def read(cls, checkpoint: Checkpoint, number: int, dtype: str, place=jnp.asarray) -> "Layer":
        """Layer `number` of a float checkpoint; `place` puts an array on the devices.

        Raises:
            ValueError: NaN or infinity in a weight, a bias or a norm's scale; names it.
        """
        prefix, projections, norms, finite = f"layers.{number}.", {}, {}, {}
        for path in names.modules(checkpoint.config):
            if path.startswith(prefix):
                module = checkpoint.read(path)
                weight_IO, finite[path] = _logical(place(np.ascontiguousarray(module.weight.data)))
                if module.bias is not None:
                    finite[f"{path}.bias"] = np.isfinite(module.bias).all()
                projections[path.removeprefix(prefix)] = Projection(weight_IO, module.bias)
        for path in names.vectors(checkpoint.config):
            if path.startswith(prefix):
                vector = checkpoint.read_vector(path).astype(np.float32)
                finite[path] = np.isfinite(vector).all()
                norms[path.removeprefix(prefix).removesuffix(".scale")] = place(vector)
        check_finite(finite)
        return cls(checkpoint.config, number, projections, norms, dtype)

    def copy(self) -> "Layer":
        """A layer of the same arrays, to be changed by itself."""
        return Layer(self.config, 0, self.projections, self._norms, self._dtype)

    def replace(self, path: str, weight_IO) -> None:
        """Puts another matrix in the place of one."""
        self.projections[path] = dataclasses.replace(self.projections[path], weight_IO=weight_IO)
        self._block = None

    # -- what `model.Weights` asks for

    def fused(self, path, outputs, layers, axes, separate_bias=None):
        """See `model.Weights`; all outputs as one float matrix."""
        del layers
        stored = [f"{path}.{name}" for name in ("qkv", *outputs) if f"{path}.{name}" in self.projections]
        parts = [self.projections[name] for name in stored]
        weight_IO = jnp.concatenate([part.weight_IO for part in parts], axis=1)
        bias_O = np.concatenate(
            [np.zeros(part.weight_IO.shape[1]) if part.bias is None else np.asarray(part.bias) for part in parts]
        ).astype(np.float32)
        separate = None
        if separate_bias is not None:
            start = sum(list(outputs.values())[: list(outputs).index(separate_bias)])
            columns = slice(start, start + outputs[separate_bias])
            if bias_O[columns].any():
                # A copy: JAX may use the array's own memory, which is changed in the next line.
                separate = jnp.asarray(bias_O[None, columns].copy())
            bias_O[columns] = 0
        linear = self._linear(weight_IO, bias_O if bias_O.any() else None, axes)
        return FusedLinear([linear], [tuple(outputs.values())]), separate

    def linear(self, path, layers, axes):
        """See `model.Weights`: attention output and MLP down are left out, their inputs are what is wanted."""
        del path, layers, axes

    def norm(self, path, layers):
        """See `model.Weights`."""
        del layers
        return RMSNorm(self._norms[path][None], self.config.norm_epsilon)

    def _linear(self, weight_IO, bias_O, axes=(None, None)) -> Linear:
        weight = DenseTensor(weight_IO.astype(self._dtype)[None], self._dtype, weight_IO.shape[0], "plain")
        return Linear(weight, None if bias_O is None else jnp.asarray(bias_O, jnp.float32)[None], axes=axes)

    # -- forward, in steps

    @property
    def block(self) -> DecoderLayer:
        """The model's layer with the present matrices."""
        if self._block is None:
            # it asks for no more than a layer's own parameters
            self._block = DecoderLayer(self.config, cast(Weights, self), range(1), "auto")
        return self._block

    def attention_input(self, hidden_BTD):
        """What query, key and value read."""
        return normed(self.block.attention_norm, hidden_BTD)

    def attended(self, hidden_BTD, lengths_B):
        """What the attention's output projection reads."""
        return _attended(self.block.attention_norm, self.block.attention, self.config, hidden_BTD, lengths_B)

    def mlp_input(self, hidden_BTD):
        """What gate and up read."""
        return normed(self.block.mlp_norm, hidden_BTD)

    def activated(self, hidden_BTD):
        """What down reads."""
        return _activated(self.block.mlp_norm, self.block.mlp, hidden_BTD)

    def add(self, path: str, hidden_BTD, x_BTI):
        """The residual stream after projection `path` ("attention.output" or "mlp.down") of its input."""
        projection = self.projections[path]
        return _add(self._linear(projection.weight_IO, projection.bias), hidden_BTD, x_BTI)


def check_finite(finite: dict) -> None:
    """Raises a ValueError that names the first of our paths whose flag is false."""
    for path, fine in jax.device_get(finite).items():
        if not fine:
            raise ValueError(f"{path}: NaN or infinity in the weights; check the checkpoint.")


@jax.jit
def _logical(data_OI):
    """A file's matrix as float32 [in, out], and whether it is finite."""
    return data_OI.T.astype(jnp.float32), jnp.isfinite(data_OI).all()


@jax.jit
def normed(norm, hidden_BTD):
    """A norm, stacked as the only one of its block, of hidden states."""
    return norm(hidden_BTD, 0)


@functools.partial(jax.jit, static_argnames="config")
def _attended(norm, attention, config: ModelConfig, hidden_BTD, lengths_B):
    B, T, _ = hidden_BTD.shape
    alpha_B = dynamic_ntk_alpha(lengths_B, config.seq_length) if config.use_dynamic_ntk else None
    tables = rotary(config, jnp.broadcast_to(jnp.arange(T), (B, T)), alpha_B)
    step = Step(tables, jnp.zeros_like(lengths_B), lengths_B)
    return attention(norm(hidden_BTD, 0), step, None, 0, 0)[0]


@jax.jit
def _activated(norm, mlp, hidden_BTD):
    return mlp(norm(hidden_BTD, 0), 0)


@jax.jit
def _add(linear, hidden_BTD, x_BTI):
    return hidden_BTD + linear(x_BTI, 0)

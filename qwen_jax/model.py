"""The decoder of Qwen v1, Qwen 1.5/2/2.5 and Qwen3: families differ by fields of the config, not by classes.

Layers that are alike form a block: their parameters are stacked and a scan walks the layer index. The model does not
know how a weight is stored (`linear.py`), where it comes from (`weights`, see `loading.py`) or how a cache is packed.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels.decode_step import Tables
from pallas_kernels.kv_attention import KVArrays, attend_prefill, attend_segments
from qwen_jax import fused_append, fused_decode
from qwen_jax.config import ModelConfig
from qwen_jax.linear import FusedLinear, Linear, RMSNorm, at_layer
from qwen_jax.rotary import Rotary, rotate
from qwen_jax.split_cache import append, attend_decode


class Weights(Protocol):
    """Where parameters come from: a checkpoint, random numbers, or shapes alone."""

    config: ModelConfig
    cache_axis: str | None  # the mesh axis a cache's length is split over

    def blocks(self) -> list[range]:
        """Runs of consecutive layers whose parameters are alike."""
        ...

    def fused(
        self, path: str, outputs: dict[str, int], layers: range, axes, separate_bias: str | None = None
    ) -> tuple[FusedLinear, Any]:
        """(FusedLinear over `outputs`, the bias kept apart [n, width] or None)."""
        ...

    def linear(self, path: str, layers: range, axes) -> Linear:
        """A projection of a block, its weight stacked over the layers."""
        ...

    def norm(self, path: str, layers: range | None) -> RMSNorm:
        """A normalisation; `layers` None for one outside the layers."""
        ...

    def embedding(self) -> Linear:
        """The token table as a Linear of logical shape [hidden, vocabulary]."""
        ...

    def head(self) -> Linear | None:
        """The output projection; None where the embedding serves."""
        ...


class Step(NamedTuple):
    """What every layer of one forward pass shares.

    Attributes:
        rotary: tables of the new tokens' positions.
        start_B: int32 [B], position of the first new token of each row.
        lengths_B: int32 [B], tokens of each row including the new ones.
        key_rotary: (cos, sin) [B or 1, S, K/2] over cache positions, or None (see `attend_decode`).
        one_launch: what `fused_decode` needs, or None where no block takes it.
        decode: one new token a row, attending to the cache; else a prompt, attending to itself.
        active_length: static bound on `lengths_B`, or None.
        segments_BT: int32 [B, T], the text that each token belongs to where a row holds several; None for one a row.
    """

    rotary: Rotary
    start_B: jax.Array
    lengths_B: jax.Array
    key_rotary: tuple[jax.Array, jax.Array] | None = None
    decode: bool = False
    active_length: int | None = None
    segments_BT: jax.Array | None = None
    one_launch: Tables | None = None


class Attention(nnx.Module):
    """Grouped-query attention; the key's bias is kept apart because an 8-bit cache stores keys without it."""

    def __init__(self, config: ModelConfig, weights: Weights, layers: range, kernels: str):
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        outputs = {"query": heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
        self.qkv: FusedLinear
        self.qkv, key_bias = weights.fused("attention", outputs, layers, ("hidden", "heads"), separate_bias="key")
        self.key_bias = nnx.data(key_bias)
        self.output = weights.linear("attention.output", layers, ("heads", "hidden"))
        self.query_norm = weights.norm("attention.query_norm", layers) if config.qk_norm else None
        self.key_norm = weights.norm("attention.key_norm", layers) if config.qk_norm else None
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.sliding_window = config.sliding_window if config.sliding_layers[layers.start] else None
        self.kernels, self.cache_axis = kernels, weights.cache_axis

    def __call__(self, hidden_BTD, step: Step, kv: KVArrays | None, layer, cache_layer):
        """Attends, writes the new tokens to `kv` (None: no cache), returns (what `output` reads [B, T, H · K], kv)."""
        B, T, _ = hidden_BTD.shape
        biased_BTGK = value_BTGK = None
        if step.decode and fused_append.takes(self, hidden_BTD, kv):
            query_BHK, kv = fused_append.run(self, hidden_BTD, step, kv, layer, cache_layer)
            query_BTHK = query_BHK[:, None]
        else:
            query_BTHK, biased_BTGK, value_BTGK, kv = self._turned(hidden_BTD, step, kv, layer, cache_layer)
        scale = self.head_dim**-0.5
        if step.decode:
            assert kv is not None
            stacked_bias = self._stacked_bias
            attended_BTHK = attend_decode(
                query_BTHK[:, 0],
                kv,
                cache_layer,
                step.lengths_B,
                axis=self.cache_axis,
                scale=scale,
                key_bias_GK=stacked_bias if kv.quantized else None,
                key_bias_layer=layer if kv.quantized and stacked_bias is not None else None,
                key_rotary=step.key_rotary if kv.quantized else None,
                sliding_window=self.sliding_window,
                active_length=step.active_length,
                kernels=self.kernels,
            )[:, None]
        elif step.segments_BT is not None:
            attended_BTHK = attend_segments(
                query_BTHK,
                biased_BTGK,
                value_BTGK,
                step.segments_BT,
                scale=scale,
                sliding_window=self.sliding_window,
            )
        else:
            attended_BTHK = attend_prefill(
                query_BTHK,
                biased_BTGK,
                value_BTGK,
                step.lengths_B,
                scale=scale,
                sliding_window=self.sliding_window,
                kernels=self.kernels,
            )
        return attended_BTHK.reshape(B, T, self.heads * self.head_dim), kv

    def _turned(self, hidden_BTD, step: Step, kv: KVArrays | None, layer, cache_layer):
        """(queries [B, T, H, K], keys with their bias, values [B, T, G, K], kv with the new tokens)."""
        B, T, _ = hidden_BTD.shape
        query, key, value = self.qkv(hidden_BTD, layer)
        query_BTHK = query.reshape(B, T, self.heads, self.head_dim)
        key_BTGK = key.reshape(B, T, self.kv_heads, self.head_dim)
        value_BTGK = value.reshape(B, T, self.kv_heads, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            query_BTHK = self.query_norm(query_BTHK, layer)
            key_BTGK = self.key_norm(key_BTGK, layer)
        turn = functools.partial(rotate, tables=step.rotary, exact=self.kernels == "exact")
        query_BTHK = turn(query_BTHK)
        if step.rotary.logn_BT is not None:
            query_BTHK = query_BTHK * step.rotary.logn_BT[:, :, None, None].astype(query_BTHK.dtype)

        stacked_bias = self._stacked_bias
        bias_GK = None if stacked_bias is None else at_layer(stacked_bias, layer)
        biased_BTGK = key_BTGK if bias_GK is None else key_BTGK + bias_GK.astype(key_BTGK.dtype)
        biased_BTGK = turn(biased_BTGK)
        if kv is not None:
            stored_BTGK = turn(key_BTGK) if kv.quantized and bias_GK is not None else biased_BTGK
            write = functools.partial(append, axis=self.cache_axis, heads=self.heads, kernels=self.kernels)
            kv = write(kv, cache_layer, stored_BTGK, value_BTGK, step.start_B)
        return query_BTHK, biased_BTGK, value_BTGK, kv

    @property
    def _stacked_bias(self):
        return None if self.key_bias is None else self.key_bias.reshape(-1, self.kv_heads, self.head_dim)


class MLP(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, weights: Weights, layers: range):
        outputs = {"gate": config.intermediate_size, "up": config.intermediate_size}
        self.gate_up, _ = weights.fused("mlp", outputs, layers, ("hidden", "mlp"))
        self.down = weights.linear("mlp.down", layers, ("mlp", "hidden"))

    def __call__(self, hidden_BTD, layer):
        """[B, T, D] → what `down` reads, [B, T, F]."""
        gate_BTF, up_BTF = self.gate_up(hidden_BTD, layer)
        return jax.nn.silu(gate_BTF) * up_BTF


class DecoderLayer(nnx.Module):
    """One block: `len(layers)` alike layers, parameters stacked, `layer` telling which one runs."""

    def __init__(self, config: ModelConfig, weights: Weights, layers: range, kernels: str):
        self.attention_norm = weights.norm("attention_norm", layers)
        self.attention = Attention(config, weights, layers, kernels)
        self.mlp_norm = weights.norm("mlp_norm", layers)
        self.mlp = MLP(config, weights, layers)
        self.first, self.count = layers.start, len(layers)

    def __call__(self, hidden_BTD, step: Step, kv: KVArrays | None, layer):
        """One layer: (hidden_BTD, kv) after attention and MLP."""
        normed_BTD = self.attention_norm(hidden_BTD, layer)
        attended_BTI, kv = self.attention(normed_BTD, step, kv, layer, self.first + layer)
        hidden_BTD, normed_BTD = self.attention.output.add_norm(attended_BTI, hidden_BTD, self.mlp_norm, layer)
        return self.mlp.down.add(self.mlp(normed_BTD, layer), hidden_BTD, layer), kv


class Decoder(nnx.Module):
    """Token ids to logits."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        dtype: str,
        kernels: str = "auto",
        unroll: bool = False,
        one_launch: bool = True,
    ):
        self.embedding = weights.embedding()
        self.blocks = nnx.List([DecoderLayer(config, weights, layers, kernels) for layers in weights.blocks()])
        self.final_norm = weights.norm("final_norm", None)
        self.lm_head = weights.head()
        self.config, self.dtype, self.unroll, self.cache_axis = config, dtype, unroll, weights.cache_axis
        self.one_launch = one_launch  # where a kernel can: see `fused_decode`

    def hidden(self, ids_BT, step: Step, kv: KVArrays | None):
        """Token ids int32 [B, T] to the last layer's normalised output [B, T, D], and the cache."""
        hidden_BTD = self.embedding.lookup(ids_BT).astype(self.dtype)
        for block in self.blocks:
            if step.one_launch is not None and kv is not None and self._in_one_launch(block, hidden_BTD, kv):
                hidden_BTD, kv = fused_decode.run(block, hidden_BTD, step, kv)
            elif block.count == 1 or (self.unroll and step.decode):
                # One traced function for all layers: kernels are lowered once.
                run = jax.jit(lambda hidden_BTD, kv, layer, block=block: block(hidden_BTD, step, kv, layer))
                for layer in range(block.count):
                    hidden_BTD, kv = run(hidden_BTD, kv, jnp.int32(layer))
            else:

                def body(carry, layer, block=block):
                    hidden_BTD, kv = carry
                    return block(hidden_BTD, step, kv, layer), None

                (hidden_BTD, kv), _ = lax.scan(body, (hidden_BTD, kv), jnp.arange(block.count))
        return self.final_norm(hidden_BTD), kv

    def _in_one_launch(self, block, hidden_BTD, kv: KVArrays) -> bool:
        reason = fused_decode.refusal(block, hidden_BTD, kv, block.attention.kernels)
        fused_decode.log_choice(range(block.first, block.first + block.count), reason)
        return reason is None

    def logits(self, hidden_BTD):
        """[..., D] → float32 [..., V]."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return head(hidden_BTD, out_dtype=jnp.float32)

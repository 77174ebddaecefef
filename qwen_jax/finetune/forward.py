"""The training forward: a decoder with its trainable terms, layer by layer, and the loss in slices of tokens.

A scan walks the layers as in inference; the terms are handed to it layer by layer, so that their gradients come out
stacked and nothing of the size of all layers is added up in between. With `remat` a layer keeps its input alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels.dense_matmul import DenseTensor
from qwen_jax.adapted_linear import Dropout, Term, adapt
from qwen_jax.adapter import norms
from qwen_jax.finetune.data import IGNORED
from qwen_jax.finetune.rows import Batch
from qwen_jax.linear import Linear
from qwen_jax.model import Decoder, Step
from qwen_jax.parallel_linear import VocabularyLinear
from qwen_jax.rotary import rotary

LOSS_TOKENS = 1024  # whose logits are in memory at a time: 0.6 GB in float32 with 151,936 tokens in the vocabulary


class Frozen(NamedTuple):
    """What a step reads and does not change.

    Attributes:
        leaves: the decoder's arrays.
        scales: {block: {module: float32 [L]}}.
        tables: see `parameters.tables`; empty without a mesh.
    """

    leaves: Any
    scales: Any
    tables: Any


class _Trained:
    """A table or head whose matrix learns: the product's derivative is JAX's own, for matrix and input."""

    weight: Any

    def _multiply(self, x, layer, bias_O=None, out_dtype=None):
        del layer
        result = lax.dot_general(
            x,
            self.weight.data.astype(x.dtype),
            (((x.ndim - 1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        result = result if bias_O is None else result + bias_O.astype(jnp.float32)
        return result.astype(x.dtype if out_dtype is None else out_dtype)


class TrainedLinear(_Trained, Linear):
    """On one device."""


class TrainedVocabularyLinear(_Trained, VocabularyLinear):
    """A device's share of the vocabulary."""


def hidden(decoder: Decoder, parameters, frozen: Frozen, batch: Batch, *, dropout: Dropout | None, remat: bool):
    """The last layer's normalised output [B, T, D] for one batch [B, T]."""
    # Dynamic NTK and log-n scaling act beyond the trained length alone, which rows do not exceed.
    step = Step(rotary(decoder.config, batch.positions), jnp.zeros_like(batch.lengths), batch.lengths)
    step = step._replace(segments_BT=batch.segments)
    hidden_BTD = decoder.embedding.lookup(batch.ids).astype(decoder.dtype)
    for number, block in enumerate(decoder.blocks):
        name = str(number)
        terms, scales = parameters["terms"][name], frozen.scales[name]
        tables = frozen.tables["terms"].get(name, {})
        learned = {norm: parameters["saved"].get(f"{name}.{norm}") for norm in norms(block)}

        def body(hidden_BTD, one, block=block, learned=learned):
            layer, terms, scales, tables = one
            own = {module: _local(term, scales[module], tables.get(module, {})) for module, term in terms.items()}
            drop = None
            if dropout is not None:
                drop = dropout._replace(key=jax.random.fold_in(dropout.key, block.first + layer))
            block = adapt(block, own, drop)
            for norm, scale in learned.items():
                if scale is not None:
                    norms(block)[norm].scale = scale
            return block(hidden_BTD, step, None, layer)[0], None

        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        hidden_BTD, _ = lax.scan(body, hidden_BTD, (jnp.arange(block.count), terms, scales, tables))
    return decoder.final_norm(hidden_BTD)


def with_saved(decoder: Decoder, parameters, frozen: Frozen) -> Decoder:
    """The decoder with its trained embedding, head and last norm in place; the same object without any."""
    saved = parameters["saved"]
    if not any(path in saved for path in ("embedding", "lm_head", "final_norm.scale")):
        return decoder
    decoder = jax.tree.map(lambda leaf: leaf, decoder)
    embedding, head = decoder.embedding, decoder.lm_head
    if "final_norm.scale" in saved:
        decoder.final_norm.scale = saved["final_norm.scale"]
    if "embedding" in saved:
        decoder.embedding = _table(embedding, saved["embedding"], frozen.tables["saved"].get("embedding"))
        if head is None:
            decoder.lm_head = nnx.data(embedding)  # the head stays the base's
    if "lm_head" in saved:
        like = embedding if head is None else head
        decoder.lm_head = nnx.data(_table(like, saved["lm_head"], frozen.tables["saved"].get("lm_head")))
    return decoder


def losses(decoder: Decoder, parameters, frozen: Frozen, batch: Batch, *, dropout: Dropout | None, remat: bool):
    """(Σ −log p(target), number of targets) over one batch, float32."""
    decoder = with_saved(decoder, parameters, frozen)
    hidden_BTD = hidden(decoder, parameters, frozen, batch, dropout=dropout, remat=remat)
    head = decoder.embedding if decoder.lm_head is None else decoder.lm_head
    hidden_ND, target_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), batch.targets.reshape(-1)
    size = min(LOSS_TOKENS, len(target_N))
    padding = -len(target_N) % size
    hidden_SND = jnp.pad(hidden_ND, ((0, padding), (0, 0))).reshape(-1, size, hidden_ND.shape[1])
    target_SN = jnp.pad(target_N, (0, padding), constant_values=IGNORED).reshape(-1, size)

    @jax.checkpoint
    def part(hidden_ND, target_N):
        logits_NV = head(hidden_ND, out_dtype=jnp.float32)
        return jnp.sum(jnp.where(target_N == IGNORED, 0.0, cross_entropy(logits_NV, target_N, head)))

    def body(total, one):
        return total + part(*one), None

    total, _ = lax.scan(body, jnp.zeros((), jnp.float32), (hidden_SND, target_SN))
    return total, jnp.sum((batch.targets != IGNORED).astype(jnp.float32))


def cross_entropy(logits_NV, target_N, head: Linear):
    """−log softmax(logits)[target], float32 [N]; on a mesh the vocabulary is divided, and the result everywhere."""
    target_N = jnp.maximum(target_N, 0)
    highest_N = lax.stop_gradient(logits_NV.max(-1))
    if not isinstance(head, VocabularyLinear):
        sum_N = jnp.exp(logits_NV - highest_N[:, None]).sum(-1)
        chosen_N = jnp.take_along_axis(logits_NV, target_N[:, None], axis=1)[:, 0]
        return highest_N + jnp.log(sum_N) - chosen_N
    width = logits_NV.shape[1]
    highest_N = lax.pmax(highest_N, head.axis)
    sum_N = lax.psum(jnp.exp(logits_NV - highest_N[:, None]).sum(-1), head.axis)
    local_N = target_N - lax.axis_index(head.axis) * width
    mine_N = (local_N >= 0) & (local_N < width)
    chosen_N = jnp.take_along_axis(logits_NV, jnp.where(mine_N, local_N, 0)[:, None], axis=1)[:, 0]
    return highest_N + jnp.log(sum_N) - lax.psum(jnp.where(mine_N, chosen_N, 0.0), head.axis)


def _local(term, scale, tables) -> Term:
    """A layer's term with its scale, what this device has of it."""
    a, b = term["a"], term["b"] * scale
    if "rows" in tables:
        a = _take(a, tables["rows"], 0)
    if "columns" in tables:
        b = _take(b, tables["columns"], 1)
    return Term(a, b)


def _take(array, index_N, axis: int):
    shape = [1] * array.ndim
    shape[axis] = -1
    taken = jnp.take(array, jnp.maximum(index_N, 0), axis=axis)
    return jnp.where((index_N >= 0).reshape(shape), taken, jnp.zeros((), array.dtype))


def _table(like: Linear, data_VD, index_V) -> Linear:
    data_VD = data_VD if index_V is None else _take(data_VD, index_V, 0)
    weight = DenseTensor(data_VD, "float32", data_VD.shape[1], "transposed")
    if isinstance(like, VocabularyLinear):
        return TrainedVocabularyLinear(
            weight,
            like.bias,
            axis=like.axis,
            vocab_size=like.vocab_size,
            devices=like.devices,
            axes=like.axes,
            kernels=like.kernels,
        )
    return TrainedLinear(weight, like.bias, axes=like.axes, kernels=like.kernels)

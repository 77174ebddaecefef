"""A decode step of a whole block of layers in one kernel launch, where the block is what that kernel takes.

Few rows leave a GPU waiting for launches: eleven kernels a layer, each with its first bytes' latency. The kernel of
`pallas_kernels.decode_step` walks all layers of a block instead (benchmarks/results/h100_decode.md); `one_launch=False`
and whatever it does not take walk them one by one.
"""

import functools
import logging

from pallas_kernels import decode_step
from pallas_kernels.chip import default_chip
from pallas_kernels.quantized_matmul import QuantizedTensor
from qwen_jax.linear import Linear
from qwen_jax.parallel_linear import RowParallelLinear

_logger = logging.getLogger(__name__)


def layer_weights(block) -> decode_step.LayerWeights | str:
    """The weights of a `model.DecoderLayer` as the kernel takes them, or one sentence why it cannot."""
    attention, mlp = block.attention, block.mlp
    for name, fused in (("query, key and value", attention.qkv), ("gate and up", mlp.gate_up)):
        if len(fused.parts) != 1:
            return f"its {name} are stored as {len(fused.parts)} matrices, not as one"
    matrices = {
        "qkv": attention.qkv.parts[0],
        "output": attention.output,
        "gate_up": mlp.gate_up.parts[0],
        "down": mlp.down,
    }
    for name, linear in matrices.items():
        if isinstance(linear, RowParallelLinear):
            if linear.inputs is not None:
                return f"its {name} gathers other devices' inputs (act-order)"
            if not linear.direct:
                return "its devices belong to several processes, or are not numbered in the mesh's order"
        elif type(linear) is not Linear:
            return f"its {name} is a {type(linear).__name__}"
        if not isinstance(linear.weight, QuantizedTensor):
            return f"its {name} is not quantized"
        if linear.bias is not None and name != "qkv":
            return f"its {name} has a bias"
    return decode_step.LayerWeights(
        **{name: linear.weight for name, linear in matrices.items()},
        attention_norm=block.attention_norm.scale,
        mlp_norm=block.mlp_norm.scale,
        qkv_bias=matrices["qkv"].bias,
        key_bias=attention.key_bias,
        query_norm=None if attention.query_norm is None else attention.query_norm.scale,
        key_norm=None if attention.key_norm is None else attention.key_norm.scale,
    )


def wanted(model, rows: int) -> bool:
    """Whether one launch may be used for so many rows; `refusal` then says which blocks take it."""
    return model.one_launch and rows <= decode_step.MOST_ROWS and default_chip() in decode_step.MULTIPROCESSORS


def refusal(block, hidden_BTD, kv, kernels: str) -> str | None:
    """None where the one launch takes this decode step, else why not."""
    if kernels not in ("auto", "mosaic_gpu"):
        return f"kernels={kernels!r} is asked for"
    chip = default_chip()
    if chip not in decode_step.MULTIPROCESSORS:
        return f"it is written for {', '.join(decode_step.MULTIPROCESSORS)}"
    if block.attention.cache_axis is not None:
        return "its cache is split along its length"
    weights = layer_weights(block)
    if isinstance(weights, str):
        return weights
    return decode_step.unsupported(decode_step.shape_of(hidden_BTD[:, 0], weights, kv), chip)


def run(block, hidden_BTD, step, kv):
    """(hidden_BTD, kv) after all layers of the block; `refusal` must be None."""
    weights = layer_weights(block)
    assert not isinstance(weights, str), weights
    hidden_BD, kv = decode_step.run(
        hidden_BTD[:, 0],
        weights,
        kv,
        step.start_B,
        step.one_launch,
        chip=default_chip(),
        epsilon=block.attention_norm.epsilon,
        sliding_window=block.attention.sliding_window,
        first_layer=block.first,
        axis=getattr(block.attention.output, "axis", None),  # of the heads; the MLP's has no more devices here
    )
    return hidden_BD[:, None], kv


@functools.cache
def log_choice(layers: range, reason: str | None) -> None:
    """Says once which form decodes a block on a chip that the kernel is written for."""
    form = "one launch" if reason is None else f"a kernel at a time, not one launch: {reason}"
    _logger.info("decode of layers %d–%d: %s", layers.start, layers.stop - 1, form)

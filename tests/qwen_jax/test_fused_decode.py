"""Which form decodes a block of layers: chosen from shapes alone, so a CPU can tell what a GPU would run."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chip import compiling_for
from qwen_jax import fused_decode
from qwen_jax.bench.models import MODELS
from qwen_jax.bench.random_weights import RandomWeights
from qwen_jax.generation import _decode
from qwen_jax.kv_cache import CacheState
from qwen_jax.model import Decoder

H100 = "NVIDIA H100 80GB HBM3"


def build(base: str, **changes):
    """A decoder of two small layers of a family, its weights as an H100 wants them."""
    bits = changes.pop("bits", 4)
    small = dict(num_layers=2, hidden_size=512, intermediate_size=640, num_heads=4, vocab_size=256)
    small |= dict(num_kv_heads=4 if base == "qwen-7b" else 2, head_dim=128, sliding_layers=(False,) * 2)
    config = dataclasses.replace(MODELS[base], **small | changes)
    weights = RandomWeights(config, bits=bits, dtype="bfloat16")
    return Decoder(config, weights, dtype="bfloat16", unroll=True, one_launch=True)


def launches(decoder, rows: int, quantized: bool) -> int:
    """Mosaic kernels in the lowered decode step."""
    leaves, structure = jax.tree.flatten(decoder)
    cache = jax.eval_shape(lambda: CacheState.empty(decoder.config, rows, 128, "bfloat16", quantized))
    step = jax.jit(lambda leaves, token, cache: _decode(structure, leaves, token, cache=cache, active_length=128))
    token = jax.ShapeDtypeStruct((rows,), jnp.int32)
    text = step.trace(leaves, token, cache).lower(lowering_platforms=("cuda",)).as_text()
    return len(re.findall(r"custom_call @mosaic_gpu", text))


@pytest.mark.parametrize("base", ["qwen-7b", "qwen2.5-7b", "qwen3-8b"])
def test_few_rows_take_one_launch(base):
    with compiling_for(H100):
        decoder = build(base)
        assert launches(decoder, 1, True) == launches(decoder, 8, False) == 1
        assert launches(decoder, 9, True) == 6  # of the one function all layers share
        decoder.one_launch = False
        assert launches(decoder, 1, True) == 6


def test_what_cannot_take_it_says_why():
    with compiling_for(H100):
        float_block = build("qwen3-8b", bits=16).blocks[0]
        kv = CacheState.empty(MODELS["qwen3-8b"], 1, 64, "bfloat16", True).kv
        hidden = jnp.zeros((1, 1, 512), jnp.bfloat16)
        assert fused_decode.refusal(float_block, hidden, kv, "auto") == "its qkv is not quantized"
        assert fused_decode.refusal(float_block, hidden, kv, "xla") == "kernels='xla' is asked for"
        block = build("qwen3-8b").blocks[0]
        block.mlp.gate_up.parts.append(block.mlp.gate_up.parts[0])
        assert "its gate and up are stored as 2 matrices" in fused_decode.refusal(block, hidden, kv, "auto")
    with compiling_for("NVIDIA A100-SXM4-80GB"):
        assert fused_decode.refusal(float_block, hidden, kv, "auto").startswith("it is written for NVIDIA H100")

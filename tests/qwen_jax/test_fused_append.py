"""Rotary and append of a decode step in one launch: the same bits as the model's steps, and where it is taken."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_attention
from pallas_kernels.chip import compiling_for
from qwen_jax import QwenForCausalLM, fused_append
from qwen_jax.bench import device_weights
from qwen_jax.generation import _decode
from qwen_jax.kv_cache import CacheState
from qwen_jax.linear import FusedLinear, Projection
from qwen_jax.model import Step
from qwen_jax.rotary import rotary
from qwen_jax.sharded_programs import ShardedPrograms
from tests.pallas_kernels import rotate_append_emulated as emulated
from tests.qwen_jax.test_fused_decode import H100, build
from tests.qwen_jax.test_fused_decode_mesh import STORAGE, config, mesh_of
from tests.qwen_jax.test_golden import CASES, FOLDER, GOLDEN, golden


class Given(Projection):
    """In a projection's place: its result."""

    def __init__(self, y):
        self.y = y

    def __call__(self, x, layer=None):
        return self.y


def emulate(*arguments, kernels, **options):
    return emulated.rotate_append(*arguments, **options)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "base, changes",
    [
        ("qwen-7b", dict(use_logn_attention=True, seq_length=4)),
        ("qwen2.5-7b", dict(head_dim=64)),
        ("qwen2.5-7b", dict(num_heads=8, num_kv_heads=1)),
        ("qwen3-8b", dict(num_heads=8)),
    ],
)
def test_the_same_bits_as_the_models_steps(monkeypatch, base, changes, quantized):
    """Heads of integers: sums of their squares are exact. Step by step, for compilers join products and sums."""
    decoder = build(base, **changes)
    attention, facts = decoder.blocks[0].attention, decoder.config
    H, G, K = attention.heads, attention.kv_heads, attention.head_dim
    random, B, S = np.random.default_rng(H), 3, 16
    if attention.query_norm is not None:
        for norm in (attention.query_norm, attention.key_norm):
            norm.scale = jnp.asarray(random.uniform(0.5, 2, (2, K)), jnp.float32)
    qkv = jnp.asarray(random.integers(-100, 120, (B, 1, (H + 2 * G) * K)) / 16, jnp.bfloat16)
    attention.qkv = FusedLinear([Given(qkv)], [(H * K, G * K, G * K)])
    start = jnp.asarray([0, 5, S - 1], jnp.int32)
    step = Step(rotary(facts, start[:, None]), start, start + 1, decode=True)
    assert (step.rotary.logn_BT is not None) == facts.use_logn_attention
    assert (attention.key_bias is not None) == facts.attention_bias
    empty = CacheState.empty(dataclasses.replace(facts, num_layers=3), B, S, "bfloat16", quantized).kv
    hidden = jnp.zeros((B, 1, facts.hidden_size), jnp.bfloat16)
    monkeypatch.setattr(kv_attention, "rotate_append", emulate)
    query, _, _, kv = attention._turned(hidden, step, empty, jnp.int32(1), jnp.int32(2))
    found = fused_append.run(attention, hidden, step, empty, jnp.int32(1), jnp.int32(2))
    for got, want in zip(*map(jax.tree.leaves, (found, (query[:, 0], kv))), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


def decoded(model, ids, tokens):
    """Logits of each token, from a program traced anew."""
    leaves, structure = jax.tree.flatten(model.decoder)

    def step(leaves, token, cache):
        return _decode(structure, leaves, token, cache=cache, active_length=64)

    # Left to itself XLA does not round what it rounds in the middle of a fusion: the key with its bias.
    step = jax.jit(step, compiler_options={"xla_allow_excess_precision": False})
    _, cache = model.prefill(ids)
    state, logits = cache.take(), []
    for token in jnp.asarray(tokens.T):
        found, state = step(leaves, token, state)
        logits.append(np.asarray(found))
    return np.stack(logits)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if "tied" not in case][::2])
def test_a_checkpoints_model_computes_the_same(monkeypatch, case, quantized):
    """The whole model with the emulation in the launch's place, where its three matrices are one."""
    load = functools.partial(QwenForCausalLM.from_pretrained, GOLDEN / case / FOLDER["gptq"], dtype="bfloat16")
    model = load(use_cache_quantization=quantized)
    if len(model.decoder.blocks[0].attention.qkv.parts) != 1:
        pytest.skip("its query, key and value are several matrices")
    ids, tokens = golden(case)["ids"], golden(case)["gptq_greedy"][:, :2]
    want, calls = decoded(model, ids, tokens), []

    def called_back(qkv_BX, kv, layer, start_B, *, heads, rotary, kernels, epsilon=0.0, **options):
        query = jax.ShapeDtypeStruct((len(qkv_BX), heads, kv.keys.shape[-1]), qkv_BX.dtype)

        def run(arguments, rotary, options):
            calls.append(arguments[0].shape)
            return emulated.rotate_append(*arguments, heads=heads, rotary=rotary, epsilon=epsilon, **options)

        result = query, jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), kv)
        return jax.pure_callback(run, result, (qkv_BX, kv, layer, start_B), rotary, options)

    monkeypatch.setattr(kv_attention, "rotate_append", called_back)
    monkeypatch.setattr(fused_append, "takes", lambda *_: True)
    found = decoded(model, ids, tokens)
    np.testing.assert_array_equal(found, want)
    assert len(calls) == 2 * model.config.num_layers


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("base", ["qwen-7b", "qwen2.5-7b", "qwen3-8b"])
def test_nothing_of_xlas_between_the_projection_and_attention(base, quantized):
    with compiling_for(H100):
        decoder = build(base)
        leaves, structure = jax.tree.flatten(decoder)
        cache = jax.eval_shape(lambda: CacheState.empty(decoder.config, 16, 128, "bfloat16", quantized))
        step = jax.jit(lambda leaves, token, cache: _decode(structure, leaves, token, cache=cache, active_length=128))
        token = jax.ShapeDtypeStruct((16,), jnp.int32)
        text = step.trace(leaves, token, cache).lower(lowering_platforms=("cuda",)).as_text()
    [layer] = [part for part in text.split("func.func ") if "custom_call @mosaic_gpu" in part]
    counts = {name: len(re.findall(rf"stablehlo\.{name}\b", layer)) for name in ("concatenate", "slice", "sqrt")}
    assert counts == dict(concatenate=0, slice=2, sqrt=2)  # gate and up; the layer's own norms
    assert layer.count("rotate_append_mosaic_gpu") == layer.count("decode_attention_mosaic_gpu") == 1


@pytest.mark.parametrize("shape, found", [((1, 2), 1), ((1, 2, 2), 0)])
def test_a_device_of_a_mesh_takes_it_for_its_heads_unless_caches_are_split(shape, found):
    mesh = mesh_of(("data", "model", "sequence")[: len(shape)], shape, jax.devices()[: np.prod(shape)])
    with compiling_for(H100):
        decoder = device_weights.shapes(config(intermediate_size=1024), STORAGE, mesh, unroll=True, one_launch=False)
        programs = ShardedPrograms(decoder, mesh)
        cache, token = programs.empty_cache(16, 128, "bfloat16", True), programs._rows(np.zeros(16, np.int32))
        traced = programs._decode.trace(programs._leaves, token, cache=cache, active_length=128)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("rotate_append_mosaic_gpu") == found and text.count("append_mosaic_gpu") == 1


def test_what_keeps_several_steps_is_said_once(caplog):
    fused_append._log_choice.cache_clear()
    hidden = jnp.zeros((16, 1, 512), jnp.bfloat16)
    with compiling_for(H100), caplog.at_level(logging.INFO, fused_append.__name__):
        decoder = build("qwen3-8b")
        attention = decoder.blocks[0].attention
        kv = jax.eval_shape(lambda: CacheState.empty(decoder.config, 16, 64, "bfloat16", True)).kv
        assert fused_append.takes(attention, hidden, kv) and fused_append.takes(attention, hidden, kv)
        assert not fused_append.takes(attention, hidden.astype(jnp.float32), kv)
        attention.cache_axis = "sequence"
        assert not fused_append.takes(attention, hidden, kv)
        attention.cache_axis, attention.kernels = None, "xla"
        assert not fused_append.takes(attention, hidden, kv)
        attention.qkv.parts.append(attention.qkv.parts[0])
        assert not fused_append.takes(attention, hidden, kv)
    said = [record.getMessage() for record in caplog.records if record.name == fused_append.__name__]
    several = "a new token is turned and written in several, not one launch: "
    assert said == [
        "a new token is turned and written in one launch",
        several + "its queries are bfloat16 or float16, not float32",
        several + "the cache is split along its length",
        several + "kernels='xla' is asked for",
        several + "query, key and value are stored as 2 matrices, not as one",
    ]


def test_other_chips_say_nothing(caplog):
    fused_append._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, fused_append.__name__):
        decoder = build("qwen3-8b")
        kv = jax.eval_shape(lambda: CacheState.empty(decoder.config, 16, 64, "bfloat16", True)).kv
        hidden = jnp.zeros((16, 1, 512), jnp.bfloat16)
        assert not fused_append.takes(decoder.blocks[0].attention, hidden, kv)
    assert not [record for record in caplog.records if record.name == fused_append.__name__]

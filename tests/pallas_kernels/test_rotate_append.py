"""Rotary and append of a decode step in one launch: instruction by instruction, interpreted, lowered and on a card.

Heads are of integers, so that the sums of their squares are exact and all results are compared bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import kv_attention
from pallas_kernels.chip import compiling_for
from pallas_kernels.kv_attention import mosaic_gpu_rotate_append as kernel
from pallas_kernels.kv_attention import op, reference
from pallas_kernels.kv_attention.tensor import KVArrays
from tests.pallas_kernels import kv_attention_portable as portable
from tests.pallas_kernels import rotate_append_emulated as emulated
from tests.pallas_kernels.test_kv_attention_mosaic_gpu import races_found, random_cache

H100 = "NVIDIA H100 80GB HBM3"
LAYERS, B, S = 2, 3, 16


def case(seed, share, K, cache, *, kv_heads=2, norm=False, bias=None, logn=False, tables=B, start=(0, 7, S - 1)):
    """(arguments, options) of a launch for the second of two layers, whose vectors are the first of theirs."""
    random, dtype = np.random.default_rng(seed), "float16" if cache == "float16" else "bfloat16"
    G, H = kv_heads, kv_heads * share
    kv = random_cache(random, (LAYERS, B, G, S, K), cache)
    qkv = random.integers(-100, 120, (B, (H + 2 * G) * K)) / 16
    qkv[0, -K:] = 0.75  # a range of zero
    angle = random.uniform(-4, 4, (tables, 1, K // 2))
    options = dict(heads=H, rotary=tuple(jnp.asarray(1.1 * f(angle), jnp.float32) for f in (np.cos, np.sin)))
    options |= dict(stack_layer=jnp.int32(0))
    if norm:
        scales = (jnp.asarray(random.uniform(0.5, 2, (LAYERS, K)), jnp.float32) for _ in range(2))
        options |= dict(zip(("query_norm_LK", "key_norm_LK"), scales, strict=True), epsilon=1e-6)
    if bias:
        options["key_bias_LX"] = jnp.asarray(random.normal(0, 30, (LAYERS, G * K)), bias)
    if logn:
        options["logn_B"] = jnp.asarray(random.uniform(1, 1.3, B), jnp.float32)
    return (jnp.asarray(qkv, dtype), kv, jnp.int32(1), jnp.asarray(start, jnp.int32)), options


def check(got, arguments, options, differing=0.0):
    """Equal to the reference; `differing`: that part of the numbers may differ in its last place."""
    want = reference.rotate_append(*arguments, **options)
    for name, a, b in zip(("queries", *kernel.cache_refs(want[1])), *map(jax.tree.leaves, (got, want)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a != b).mean() <= differing, name
        a, b = a.astype(np.float32), b.astype(np.float32)
        np.testing.assert_allclose(a, b, rtol=2**-6, atol=1.0 if name in ("keys", "values") else 2**-10, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 4, 7, 8]),
    st.sampled_from([32, 64, 96, 128]),
    st.sampled_from(["uint8", "bfloat16", "float16"]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([None, "float32", "bfloat16"]),
    st.booleans(),
    st.sampled_from([1, B]),
    st.lists(st.integers(-1, S), min_size=B, max_size=B),  # −1 and S lie outside and are dropped
)
def test_instruction_by_instruction(seed, share, K, cache, kv_heads, norm, bias, logn, tables, start):
    options = dict(kv_heads=kv_heads, norm=norm, bias=bias, logn=logn, tables=tables, start=start)
    arguments, options = case(seed, share, K, cache, **options)
    check(emulated.rotate_append(*arguments, **options), arguments, options)


@pytest.mark.parametrize(
    "share, K, cache, options",
    [
        (1, 32, "uint8", dict(bias="float32", start=(0, S, 5))),
        (4, 64, "bfloat16", dict(bias="float32", norm=True, logn=True, tables=1)),
        (8, 128, "uint8", dict(norm=True, kv_heads=1)),
    ],
)
def test_under_the_interpreter(share, K, cache, options):
    arguments, options = case(K, share, K, cache, **options)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    got = kernel.rotate_append(*arguments, **options, arithmetic=portable.PortableRotate, interpret=interpret)
    assert not races_found()
    check(got, arguments, options, differing=1e-2)  # XLA joins products and sums


@pytest.mark.parametrize("cache", ["uint8", "bfloat16", "float16"])
@pytest.mark.parametrize("K", [64, 96, 128])
def test_lowers_for_cuda_in_place(cache, K):
    arguments, options = case(0, 4, K, cache, norm=True, bias="float32", logn=True)
    run = jax.jit(kernel.rotate_append, donate_argnums=1, static_argnames=("heads", "epsilon"))
    text = run.trace(*arguments, **options).lower(lowering_platforms=("cuda",)).as_text()
    arrays = 6 if cache == "uint8" else 2
    assert text.count("output_operand_alias<") == arrays
    assert text.count("custom_call @mosaic_gpu") == 1 and "rotate_append" in text
    assert "stablehlo.concatenate" not in text and "stablehlo.slice" not in text


@pytest.mark.parametrize(
    "chip, kernels, dtype, length, reason",
    [
        (H100, "auto", "bfloat16", 16, None),
        (H100, "mosaic_gpu", "float16", 16, None),
        (H100, "xla", "bfloat16", 16, "kernels='xla' is asked for"),
        (H100, "exact", "bfloat16", 16, "kernels='exact' is asked for"),
        (H100, "auto", "float32", 16, "its queries are bfloat16 or float16, not float32"),
        (H100, "auto", "bfloat16", 12, "must be a multiple of 8"),
        ("TPU v5e", "auto", "bfloat16", 16, "it is written for Hopper GPUs"),
        ("cpu", "auto", "bfloat16", 16, "it is written for Hopper GPUs"),
    ],
)
def test_where_it_runs(chip, kernels, dtype, length, reason):
    kv = KVArrays(*[jax.ShapeDtypeStruct((1, 1, 2, length, 64), jnp.dtype(dtype))] * 2)
    with compiling_for(chip):
        found = op.rotate_append_unsupported(kv, 4, jnp.dtype(dtype), kernels)
    assert (found is None) if reason is None else reason in found


def test_errors_say_what_was_expected():
    (qkv, kv, layer, start), options = case(0, 1, 64, "uint8")
    with pytest.raises(ValueError, match="it is written for Hopper GPUs .* expected the steps one by one"):
        kv_attention.rotate_append(qkv, kv, layer, start, **options)
    with compiling_for(H100), pytest.raises(ValueError, match=r"qkv_BX: shape \(3, 384\), expected \(3, 512\)"):
        kv_attention.rotate_append(qkv, kv, layer, start, **options | {"heads": 4})


@pytest.mark.gpu
@pytest.mark.parametrize("norm, logn, tables", [(False, True, B), (True, False, 1)])
@pytest.mark.parametrize(
    "share, K, cache", [(1, 128, "uint8"), (8, 128, "bfloat16"), (7, 64, "uint8"), (4, 96, "float16")]
)
def test_on_the_card(share, K, cache, norm, logn, tables):
    arguments, options = case(K, share, K, cache, norm=norm, logn=logn, tables=tables, bias="float32", start=(0, 9, S))
    before = jax.tree.map(np.array, arguments)
    run = jax.jit(functools.partial(kernel.rotate_append, **options), donate_argnums=1)
    compiled = run.lower(*arguments).compile()
    assert " copy(" not in compiled.as_text()  # nothing of the cache is copied
    check(compiled(*arguments), before, options, differing=2e-3)

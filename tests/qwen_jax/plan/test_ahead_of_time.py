"""Kernels and whole programs compiled for TPUs that are not here. `benchmarks/aot/refresh.py` compiles them all."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.bench.models import MODELS
from qwen_jax.plan import aot, chips, kernels
from qwen_jax.plan.abstract import Storage

pytestmark = pytest.mark.usefixtures("optimized")
needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
BIG = {"batch": 8, "context": 2048, "kv_bits": 8}


@pytest.fixture(autouse=True)
def not_kept():
    """JAX cannot read programs for absent devices back from its cache: none is written, whatever a test before set."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def compiled(name, topology, data, model, prompt=None):
    found = chips.parse(topology)
    mesh = aot.mesh_of(found, data, model)
    return aot.compile_step(MODELS[name], Storage(), mesh, found.chip.kind, prompt=prompt, **BIG), found


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "name", "matrix", "rows", "bits"),
    [
        ("v5e", "qwen-7b", "down", 1, 4),  # 86 groups: not a multiple of 8
        ("v6e", "qwen-72b", "gate_up", 64, 4),
        ("v5p", "qwen-14b", "down", 8, 8),  # 107 groups, two cores
        ("v5e", "qwen3-8b", "qkv", 2048, 4),
        ("v6e", "qwen-1.8b", "down", 300, 8),
    ],
)
def test_matmul(chip, name, matrix, rows, bits):
    found = kernels.compile_matmul(chip, *kernels.projections(MODELS[name])[matrix], rows, bits, zeros=bits == 8)
    assert found.copies == () and found.temporaries < 1 << 20


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "name", "kv_bits"),
    [
        pytest.param("v5e", "qwen-7b", 8, marks=pytest.mark.slow),
        pytest.param("v5p", "qwen2.5-7b", 8, marks=pytest.mark.slow),
        ("v6e", "qwen3-8b", 16),  # 8 bits: in the whole program of `test_72b_on_eight_chips`
    ],
)
def test_append_and_attention(chip, name, kv_bits):
    found = kernels.compile_attention(chip, MODELS[name], 8, 2048, kv_bits)
    assert found.copies == () and found.temporaries < 8 << 20


@needs_libtpu
@pytest.mark.slow
def test_7b_on_one_chip():
    step, topology = compiled("qwen-7b", "v5e:1x1", 1, 1)
    assert aot.fits(step, topology) and step.copies == ()
    assert step.arguments == pytest.approx(step.weights + step.cache, rel=0.01)
    assert step.temporaries < 1 << 26 and step.aliased >= 0.99 * step.cache


@needs_libtpu
def test_72b_on_eight_chips():
    step, topology = compiled("qwen-72b", "v5e:2x4", 1, 8)
    assert aot.fits(step, topology) and step.copies == ()
    assert step.arguments == pytest.approx(step.weights + step.cache, rel=0.01)
    assert step.temporaries < 1 << 26 and step.aliased >= 0.99 * step.cache
    # Two in the loop over the layers, one for the embedding; the logits stay where they are.
    assert (step.all_reduces, step.all_gathers) == (3, 0)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("qwen-14b", (1, 8)), ("qwen3-8b", (1, 8)), ("qwen2.5-7b", (1, 4, 2))])
def test_scales_of_a_few_heads_are_not_copied(name, sizes):
    """Five key/value heads a chip, one, and one with the cache's length split: no number that fills a tile."""
    topology = chips.parse("v5e:2x4")
    step = aot.compile_step(MODELS[name], Storage(), aot.mesh_of(topology, *sizes), topology.chip.kind, **BIG)
    assert step.copies == () and step.aliased >= 0.99 * step.cache
    assert (step.all_reduces, step.all_gathers) == (3, len(sizes) - 2)


def test_no_program_of_the_table_copies():
    table = json.loads((pathlib.Path(__file__).parents[3] / "benchmarks" / "results" / "aot.json").read_text())
    lines = [*table["programs"], *table["long"], *table["kernels"]]
    assert len(lines) > 300 and not [line for line in lines if line["copies"]]
    assert all(line["fits"] for line in [*table["programs"], *table["long"]])


@needs_libtpu
def test_prefill_writes_the_cache_in_place():
    step, topology = compiled("qwen2.5-0.5b", "v6e:1x1", 1, 1, prompt=256)
    assert aot.fits(step, topology) and step.aliased >= 0.99 * step.cache


def test_copies_are_found():
    """In a text as XLA writes it: a layer's weight and a whole cache, but no prefetch and no activation."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "model"))
    weight = jax.ShapeDtypeStruct((32, 512, 8192), jnp.int32, sharding=sharding)
    cache = jax.ShapeDtypeStruct((32, 8, 32, 2048, 128), jnp.uint8, sharding=sharding)
    text = """
  %copy.1 = s32[512,4096]{1,0:T(8,128)} copy(%bitcast.3), metadata={}
  ROOT %copy.2 = u8[32,8,16,2048,128]{4,3,2,1,0:T(32,128)(4,1)} copy(%param.9)
  %copy.3 = s32[512,4096]{1,0:T(8,128)S(1)} copy(%bitcast.3)
  %copy.4 = bf16[8,4096]{1,0} copy(%x)
  %fusion.5 = s32[512,4096]{1,0} fusion(%x)
"""
    assert list(aot.copies(text, [weight, cache])) == [
        ("copy s32[512,4096]", 4 * 512 * 4096),
        ("copy u8[32,8,16,2048,128]", 32 * 8 * 16 * 2048 * 128),
    ]


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="topology v5e:2x2: libtpu is not installed; pip install"):
        aot.devices(chips.parse("v5e:2x2"))

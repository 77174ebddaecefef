"""Random weights on a mesh: the model of one device, kernels of a GPU for each device's share, nothing copied."""

import dataclasses
import json
import re

import numpy as np
import pytest

from qwen_jax import cli
from qwen_jax.bench import decode, one_device, prefill
from qwen_jax.bench.models import MODELS
from qwen_jax.bench.random_checkpoint import RandomCheckpoint
from qwen_jax.generation import Programs
from qwen_jax.loading import CheckpointWeights
from qwen_jax.model import Decoder
from qwen_jax.plan import aot
from qwen_jax.plan.abstract import Storage
from qwen_jax.sampling import SamplingConfig
from qwen_jax.sharded_programs import ShardedPrograms
from qwen_jax.sharded_weights import ShardedWeights
from qwen_jax.sharding import parse_mesh

H100 = "NVIDIA H100 80GB HBM3"
SMALL = dataclasses.replace(
    MODELS["qwen2.5-7b"],
    vocab_size=320,
    hidden_size=256,
    intermediate_size=640,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    sliding_layers=(False,) * 2,
)


def tokens(programs: Programs, dtype="float32"):
    ids, lengths = np.arange(24, dtype=np.int32).reshape(2, 12), np.array([12, 9], np.int32)
    settings = SamplingConfig(do_sample=True)  # greedy tokens of random weights repeat one
    chunks = programs.stream(
        ids, lengths, programs.empty_cache(2, 64, dtype, False), settings, np.arange(2, dtype=np.uint32), (), 0, 12
    )
    return np.concatenate([chunk.tokens_BN for chunk in chunks], axis=1)


# Qwen2.5-7B's heads: on eight devices each key/value head has two copies, and one of eight places for seven queries is
# empty.
GROUPED = dataclasses.replace(SMALL, num_heads=28, num_kv_heads=4, head_dim=16)


@pytest.mark.parametrize(
    "config, mesh",
    [(SMALL, "1x2"), *(pytest.param(GROUPED, mesh, marks=pytest.mark.slow) for mesh in ("1x8", "1x4x2"))],
)
def test_the_model_of_one_device(config, mesh):
    source = RandomCheckpoint(config, dtype="float32")
    one = Programs(Decoder(config, CheckpointWeights(source, dtype="float32"), dtype="float32"))
    weights = ShardedWeights(source, parse_mesh(mesh), dtype="float32")
    many = ShardedPrograms(Decoder(weights.config, weights, dtype="float32"), parse_mesh(mesh))
    want = tokens(one)
    assert len(np.unique(want)) > 6
    np.testing.assert_array_equal(tokens(many), want)


def test_bench_measures_on_a_mesh(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    mesh = parse_mesh("1x2")
    decoder = decode.build("small", bits=4, dtype="float32", mesh=mesh)
    settings = dict(bits=4, kv_bits=8, batch=2, context=64, rounds=1, mesh=mesh)
    found = decode.measure("small", decoder, steps=4, **settings)
    assert found.mesh == "1x2" and found.tokens_per_second > 0
    alone = decode.build("small", bits=4, dtype="float32")
    whole = decode.step_bytes(alone, 8, 2, 64)
    assert 0.5 * whole < found.bytes_per_step < 0.65 * whole  # 320 ids and 640 rows are split unevenly
    assert prefill.measure("small", decoder, **settings).milliseconds > 0


def test_bench_compares_with_one_device(monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "small", SMALL)
    options = ["--model", "small", "--dtype", "float32", "--context", "64", "--rounds", "1", "--check", "--json"]
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "decode", *options, "--mesh", "1x2", "--batch", "2"])
    [result] = json.loads(capsys.readouterr().out)["results"]
    assert (exit.value.code or 0, result["same_tokens"]) == (0, "equal")
    assert result["efficiency"] == pytest.approx(result["times"] / 2)
    one, other = {"step_ms": 3.0}, {"step_ms": 2.0, "mesh": "1x2"}
    found = one_device.compare(other, one, np.array([[1, 2], [3, 4]]), np.array([[1, 5], [6, 4]]))
    assert found == {
        "one_device_ms": 3.0,
        "times": 1.5,
        "efficiency": 0.75,
        "same_tokens": "row 1 differs at token 0",
    }


@pytest.mark.parametrize("text, message", [("2", "expected two sizes"), ("1x0", "expected two"), ("4x4", "JAX sees 8")])
def test_other_meshes_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


@pytest.mark.parametrize("name, mesh", [("qwen-7b", "1x2"), ("qwen2.5-7b", "1x2"), ("qwen2.5-7b", "1x2x2")])
def test_kernels_of_a_gpu_run_on_each_share(name, mesh):
    """Lowered for H100s: every matmul and the attention of a layer is a Mosaic kernel over a device's own share, no
    weight or cache is gathered, and sums between devices are of activations. A sequence gathers attention's results."""
    config = dataclasses.replace(MODELS[name], num_layers=2, sliding_layers=(False,) * 2)
    with aot.programs(config, Storage(), parse_mesh(mesh), H100) as (program, decoder):
        cache = aot.abstract_cache(program, 8, 2048, "bfloat16", True)
        rows = cache.lengths_B
        traced = program._decode.trace(program._leaves, rows, cache=cache, active_length=2048)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert decoder.blocks[0].mlp.down.weight.layout == "mosaic_gpu"
    # One layer in a loop: four matmuls, the cache's new tokens, attention (which may take a second kernel to merge).
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) >= 6
    collectives = {op: text.count(f"stablehlo.{op}") for op in ("all_reduce", "all_gather", "all_to_all")}
    assert collectives == {"all_reduce": 3, "all_gather": mesh.count("x") - 1, "all_to_all": 0}

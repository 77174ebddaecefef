"""Sums of few rows over a mesh in a launch of each device's own: where a model takes them, and where XLA's stay."""

import functools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import card_sums
from pallas_kernels.card_sums import exchange
from pallas_kernels.chip import compiling_for
from pallas_kernels.decode_step import MULTIPROCESSORS
from qwen_jax import QwenForCausalLM, parallel_linear, peers
from qwen_jax.bench import device_weights
from qwen_jax.linear import RMSNorm
from qwen_jax.sharded_programs import ShardedPrograms
from qwen_jax.sharding import Placement
from tests.qwen_jax.test_fused_decode_mesh import H100, STORAGE, config, mesh_of
from tests.qwen_jax.test_golden import FOLDER, GOLDEN, decode_logits, golden
from tests.qwen_jax.test_sharding import QWEN1

NAMES = ("data", "model")


def reductions(mesh, rows, change=None, chip=H100) -> tuple[int, int]:
    """(all-reduces, our sums) of a decode step of two layers, the layers a kernel at a time."""
    with compiling_for(chip):
        decoder = device_weights.shapes(config(intermediate_size=1024), STORAGE, mesh, unroll=True, one_launch=False)
        for linear in (decoder.blocks[0].attention.output, decoder.blocks[0].mlp.down) if change else ():
            change(linear, mesh)
        programs = ShardedPrograms(decoder, mesh)
        cache = programs.empty_cache(rows, 128, "bfloat16", True)
        token = programs._rows(np.zeros(rows, np.int32))
        traced = programs._decode.trace(programs._leaves, token, cache=cache, active_length=128)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "uses_xla_collective_metadata = true" not in text
    return text.count('"stablehlo.all_reduce"'), len(re.findall(r"mosaic_gpu.*card_sums", text))


@pytest.mark.parametrize(
    "names, shape", [(NAMES, (1, 2)), (NAMES, (2, 2)), (NAMES[::-1], (4, 2)), ((*NAMES, "sequence"), (1, 2, 1))]
)
def test_layers_without_all_reduces(names, shape):
    mesh = mesh_of(names, shape, jax.devices()[: np.prod(shape)])
    found = reductions(mesh, 32 * mesh.shape["data"])
    assert found == (1, 2), "the embedding's all-reduce, and two sums in the one function of all layers"


def test_a_checkpoints_model_computes_the_same_with_them(monkeypatch):
    """The launch replaced by its definition, for it cannot run here: all else is what a GPU runs."""
    path, mesh = GOLDEN / QWEN1 / FOLDER["gptq"], mesh_of(NAMES, (2, 2), jax.devices()[:4])
    ids, tokens = golden(QWEN1)["ids"], golden(QWEN1)["gptq_greedy"][:, :2]
    loaded = functools.partial(QwenForCausalLM.from_pretrained, path, dtype="bfloat16", mesh=mesh, one_launch=False)
    want, calls = decode_logits(loaded(), ids, tokens), []

    def add_sum(share_MD, hidden_MD, addresses, *, chip):
        calls.append((share_MD.shape, addresses.shape, chip))
        return hidden_MD + lax.psum(share_MD, "model")

    def add_sum_norm(share_MD, hidden_MD, scale_LD, layer, addresses, *, epsilon, chip):
        hidden_MD = add_sum(share_MD, hidden_MD, addresses, chip=chip)
        return hidden_MD, RMSNorm(scale_LD, epsilon)(hidden_MD, layer)

    monkeypatch.setitem(MULTIPROCESSORS, "cpu", 1)
    monkeypatch.setattr(card_sums, "add_sum", add_sum)
    monkeypatch.setattr(card_sums, "add_sum_norm", add_sum_norm)
    found = decode_logits(loaded(), ids, tokens)
    np.testing.assert_array_equal(found, want)
    assert set(calls) == {((rows, 128), (1, 8), "cpu") for rows in (1, 24)}


def test_many_rows_and_other_chips_keep_all_reduces():
    mesh = mesh_of(NAMES, (1, 2))
    assert reductions(mesh, 64) == (1, 2)
    assert reductions(mesh, 65) == (3, 0)
    assert reductions(mesh, 4, chip="NVIDIA A100-SXM4-80GB") == (3, 0)
    with compiling_for("cpu"):
        assert device_weights.shapes(config(), STORAGE, mesh).blocks[0].mlp.down.peers is None


def indirect(linear, mesh):
    linear.direct = False


def act_order(linear, mesh):
    shape, sharding = (2, 2 * linear.weight.in_features), NamedSharding(mesh, P(None, "model"))
    linear.inputs = nnx.data(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding))


def biased(linear, mesh):
    linear.bias = nnx.data(jax.ShapeDtypeStruct((2, 256), jnp.float32, sharding=NamedSharding(mesh, P())))


@pytest.mark.parametrize(
    "change, reason",
    [
        (indirect, "the devices belong to several processes, or are not numbered in the mesh's order"),
        (biased, "a projection has a bias"),
        (act_order, "a projection gathers other devices' inputs (act-order)"),
    ],
)
def test_what_keeps_all_reduces_is_said_once(caplog, change, reason):
    parallel_linear._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, parallel_linear.__name__):
        assert reductions(mesh_of(NAMES, (1, 2)), 8, change) == (3, 0)
    said = [record.getMessage() for record in caplog.records if record.name == parallel_linear.__name__]
    assert said == [f"sums of few rows over model: all-reduces, not a launch each: {reason}"]


def test_devices_along_a_sequence_keep_all_reduces():
    assert reductions(mesh_of((*NAMES, "sequence"), (1, 2, 2), jax.devices()[:4]), 8)[1] == 0


@pytest.mark.parametrize("names, shape", [(NAMES, (1, 2)), (NAMES, (2, 4)), (NAMES[::-1], (4, 2))])
def test_a_device_has_its_own_addresses(names, shape):
    mesh = mesh_of(names, shape, jax.devices()[: np.prod(shape)])
    with compiling_for(H100):
        table = peers.addresses(Placement(mesh), 256, "bfloat16")
    owners = {}
    for group in np.moveaxis(mesh.devices, names.index("model"), -1):
        for device, (inbox, numbers) in zip(group, exchange._memory(tuple(group), 256), strict=True):
            assert inbox.devices() == numbers.devices() == {device}
            owners |= {array.unsafe_buffer_pointer(): (kind, device) for kind, array in enumerate((inbox, numbers))}
    for shard in table.addressable_shards:
        [(rank, numbers, inbox, *others)] = np.asarray(shard.data).view(np.int64)
        [group] = [g for g in np.moveaxis(mesh.devices, names.index("model"), -1) if shard.device in g]
        assert group[rank] == shard.device
        assert owners[numbers] == (1, shard.device) and owners[inbox] == (0, shard.device)
        assert [owners[other] for other in others] == [(0, d) for d in [*group[rank + 1 :], *group[:rank]]]


@pytest.mark.gpu
def test_cards_add_as_xla_does():
    """Needs two Hopper GPUs; in a process of its own, which is ended if cards wait for each other."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    root = Path(__file__).parents[2]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".1"}  # this process has most of the memory
    subprocess.run([sys.executable, root / "benchmarks" / "card_sums.py"], env=environment, check=True, timeout=300)

"""One launch over the devices of a mesh: lowered for CUDA, and what cannot take it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.chip import compiling_for
from pallas_kernels.decode_step.group import Group
from pallas_kernels.quantized_matmul import layout, layout_mosaic_gpu
from qwen_jax import fused_decode
from qwen_jax.bench import decode, device_weights, split
from qwen_jax.bench.models import MODELS
from qwen_jax.kv_cache import CacheState
from qwen_jax.plan.abstract import Storage
from qwen_jax.sharded_programs import ShardedPrograms

H100 = "NVIDIA H100 80GB HBM3"
STORAGE = Storage(scales="bfloat16")


def config(base="qwen-7b", **changes):
    """Two layers; 9 groups of F, so that the second of two devices has an empty one."""
    small = dict(num_layers=2, sliding_layers=(False,) * 2, hidden_size=256, num_heads=4, head_dim=128, vocab_size=600)
    small |= dict(num_kv_heads=4 if base == "qwen-7b" else 2, intermediate_size=1152)
    return dataclasses.replace(MODELS[base], **small | changes)


def mesh_of(names, shape, devices=None):
    return jax.make_mesh(shape, names, devices=jax.devices()[:2] if devices is None else devices)


def lowered(mesh, rows=1, inner=1152) -> str:
    """A decode step for as many H100."""
    with compiling_for(H100):
        decoder = device_weights.shapes(config(intermediate_size=inner), STORAGE, mesh, unroll=True)
        programs = ShardedPrograms(decoder, mesh)
        cache = programs.empty_cache(rows, 128, "bfloat16", True)
        token = programs._rows(np.zeros(rows, np.int32))
        traced = programs._decode.trace(programs._leaves, token, cache=cache, active_length=128)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("names, shape", [(("data", "model"), (1, 2)), (("model", "data"), (2, 1))])
def test_all_layers_and_their_sums_in_one_launch(names, shape):
    text = lowered(mesh_of(names, shape))
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1
    assert "uses_xla_collective_metadata = true" in text and "skip_device_barrier = false" in text
    assert len(re.findall(r'"stablehlo.all_reduce"', text)) == 1, "the embedding's, and no other"


@pytest.mark.parametrize("names, shape", [(("data", "model"), (2, 2)), (("model", "data"), (4, 2))])
def test_peers_are_numbered_as_the_meshs_devices(names, shape):
    mesh = jax.make_mesh(shape, names, devices=jax.devices()[: shape[0] * shape[1]])

    def number():
        group = Group.here("model")
        return (group.first() + lax.axis_index("model") * group.stride).reshape(1, 1)

    found = jax.jit(jax.shard_map(number, mesh=mesh, in_specs=(), out_specs=P(*names), check_vma=False))()
    assert np.array_equal(found, np.arange(mesh.size).reshape(shape))
    assert "uses_xla_collective_metadata = true" in lowered(mesh, rows=mesh.shape["data"], inner=1024)


def test_rows_on_two_devices_need_no_sums():
    text = lowered(mesh_of(("data", "model"), (2, 1)), rows=2)
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1
    assert "uses_xla_collective_metadata = false" in text


def test_the_benchmark_names_the_form_of_a_mesh():
    mesh = mesh_of(("data", "model"), (1, 2))
    with compiling_for(H100):
        decoder = device_weights.shapes(config(), STORAGE, mesh)
        cache = ShardedPrograms(decoder, mesh).empty_cache(1, 128, "bfloat16", True)
        assert decode.form_of(decoder, decode._of_one_device(cache.kv)) == decode.ONE
        decoder.one_launch = False
        assert decode.form_of(decoder, decode._of_one_device(cache.kv)) == decode.EACH


def test_a_step_is_split_by_the_names_of_its_kernels():
    busy = {"decode_step_mosaic_gpu_kernel": 4.0, "ncclDevKernel_AllGather_RING_LL": 0.5, "psum_7_0_fusion_1": 0.25}
    assert split.of_step(busy | {"gemm": 1.0}, 2) == {"busy_ms": 2.875, "reductions_ms": 0.375, "launch_ms": 2.0}
    assert split.of_step({}, 2) == {"busy_ms": None, "reductions_ms": None, "launch_ms": None}


def test_devices_in_another_order_take_a_kernel_at_a_time():
    with compiling_for(H100):
        mesh = mesh_of(("data", "model"), (1, 2), jax.devices()[1::-1])
        block = device_weights.shapes(config(), STORAGE, mesh).blocks[0]
        kv = jax.eval_shape(lambda: CacheState.empty(config(num_kv_heads=2), 1, 64, "bfloat16", True)).kv
        reason = fused_decode.refusal(block, jnp.zeros((1, 1, 256), jnp.bfloat16), kv, "auto")
    assert reason == "its devices belong to several processes, or are not numbered in the mesh's order"


def numbers(tensor, devices):
    """float32 [L, in, out] of each device's share."""
    found = []
    for device in range(devices):
        share = jax.tree.map(lambda a, d=device: jnp.asarray(np.split(np.asarray(a), devices, axis=1)[d]), tensor)
        whole = layout_mosaic_gpu.unpack(share)
        q = np.stack([layout.unpack(np.asarray(packed), 4, whole.in_features) for packed in whole.packed])
        scales = np.repeat(np.asarray(whole.scales, np.float32), whole.group_size, 1)[:, : whole.in_features]
        found.append((q.astype(np.float32) - 8) * scales)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_random_models_have_the_same_numbers_on_one_device_and_on_several(devices):
    changes = {} if devices == 2 else dict(num_heads=8, num_kv_heads=4, intermediate_size=1920)  # 15 groups
    base = config("qwen2.5-7b", **changes)
    mesh = mesh_of(("data", "model"), (1, devices), jax.devices()[:devices])
    with compiling_for(H100):
        one, two = (
            jax.tree.unflatten(
                jax.tree.structure(device_weights.shapes(base, STORAGE, where)),
                device_weights.maker(base, STORAGE, where, devices)(),
            ).blocks[0]
            for where in (None, mesh)
        )
    for fused, shared in ((one.attention.qkv, two.attention.qkv), (one.mlp.gate_up, two.mlp.gate_up)):
        [whole], shares = numbers(fused.parts[0].weight, 1), numbers(shared.parts[0].weight, devices)
        ends, cuts = np.cumsum(fused.sizes[0]), np.cumsum(shared.sizes[0])
        for part in range(len(ends)):
            mine = np.split(whole, ends[:-1], axis=2)[part]
            theirs = np.concatenate([np.split(share, cuts[:-1], axis=2)[part] for share in shares], axis=2)
            assert np.array_equal(mine, theirs[:, :, : mine.shape[2]])
    for linear, shared in ((one.attention.output, two.attention.output), (one.mlp.down, two.mlp.down)):
        [whole], shares = numbers(linear.weight, 1), np.concatenate(numbers(shared.weight, devices), axis=1)
        rows = whole.shape[1]
        assert np.array_equal(whole, shares[:, :rows]) and not shares[:, rows:].any()

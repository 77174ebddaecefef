"""What has gone wrong elsewhere when models were cut: short groups, sums in 16 bits, 8-bit keys under large biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantized_matmul import QuantizedTensor, layout
from qwen_jax import QwenForCausalLM
from qwen_jax.parallel_linear import RowParallelLinear
from qwen_jax.sharding import parse_mesh
from tests.edited import rounded
from tests.qwen_jax.test_golden import decode_logits, golden, relative_error
from tests.qwen_jax.test_model_features import QWEN2, edited, large_key_biases
from tests.qwen_jax.test_sharding import ACT_ORDER, LIMIT, make_mesh


def loaded(folder, mesh=None, **options):
    mesh = None if mesh is None else parse_mesh(mesh)
    return QwenForCausalLM.from_pretrained(folder, dtype="float32", mesh=mesh, **options)


@pytest.mark.parametrize(
    "mesh", ["1x3", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1x2", "1x8", "1x2x3"))]
)
def test_a_short_last_group(tmp_path, mesh):
    """320 inputs in groups of 128, the last of 64: three devices have a group each, others halves and quarters."""
    folder, ids = rounded(ACT_ORDER, tmp_path, {"bits": 4, "group_size": 128, "sym": False}), golden(ACT_ORDER)["ids"]
    assert relative_error(loaded(folder, mesh)(ids), loaded(folder)(ids)) < LIMIT


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_sums_between_devices_are_float32(devices):
    """4096 inputs of 64, weights +1 in the first half and −1 in the second: what each device adds up is beyond
    float16, or is what float16 rounds; and a row has the same result whatever number of rows it is part of."""
    ones = np.full((2048, 16), 7)
    packed = layout.pack(np.concatenate([8 + ones, 8 - ones]), 4)
    weight = QuantizedTensor(packed, np.full((32, 16), 1 / 7, np.float16), None, None, 4, 128, 4096 // devices)
    specs = QuantizedTensor(P("model"), P("model"), None, None, 4, 128, 4096 // devices)
    mesh = make_mesh(1, devices, AxisType.Auto)

    def multiply(x_MI):
        def local(x_MI, weight):
            return RowParallelLinear(weight, axis="model")(x_MI)

        split = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "model"), specs), out_specs=P(), check_vma=False)
        return np.asarray(jax.jit(split)(x_MI, weight), np.float64)

    noise, alone = np.random.default_rng(0).normal(0, 1, (256, 4096)), None
    for rows in (1, 8, 64, 256):
        assert np.abs(multiply(jnp.full((rows, 4096), 64, jnp.float16))).max() <= 1e-2
        first_O = multiply(jnp.asarray(noise[:rows], jnp.float16))[0]
        alone = first_O if alone is None else alone
        assert np.abs(first_O - alone).max() <= 1e-3 * np.abs(alone).max()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x2", "1x2x2", "2x1x4"])
def test_large_key_biases_cost_the_8_bit_cache_nothing(tmp_path, mesh):
    ids, tokens = golden(QWEN2)["ids"], golden(QWEN2)["float_greedy"]
    errors = {}
    for name, change in {"plain": None, "biased": large_key_biases}.items():
        folder = edited(tmp_path / name, change)
        exact = decode_logits(loaded(folder), ids, tokens)
        errors[name] = relative_error(
            decode_logits(loaded(folder, mesh, use_cache_quantization=True), ids, tokens), exact
        )
    assert 0 < errors["biased"] <= 2 * errors["plain"]

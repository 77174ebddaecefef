"""The derivative of both matmuls for their input, against finite differences in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_matmul import DenseTensor, dense_matmul
from pallas_kernels.dense_matmul import prepack as prepack_dense
from pallas_kernels.quantized_matmul import layout, mosaic_gpu, mosaic_tpu, op, quantized_matmul, transposed
from pallas_kernels.quantized_matmul.reference import dequantize

LIMIT = 2e-5  # float32 products against float64, as a ratio of norms
CASES = [
    (4, 64, False, False),
    (4, 64, True, True),
    (4, 320, False, False),  # one group a column
    (8, 32, True, False),
    (8, 128, False, True),  # 320 inputs: the last group is short
    (3, 64, True, True),
    (2, 64, False, False),
]
IN, OUT, LAYERS, ROWS = 320, 48, 3, 12


def make(bits, group_size, zeros, permuted, seed=0):
    """A stack of three matrices, and their float64 values in the order of the inputs."""
    rng = np.random.default_rng(seed)
    groups = -(-IN // group_size)
    tensors, values = [], []
    for _ in range(LAYERS):
        q_IO = rng.integers(0, 2**bits, (IN, OUT)).astype(np.uint8)
        scales_GO = rng.uniform(0.5, 1.5, (groups, OUT)).astype(np.float16)
        zeros_GO = rng.integers(0, 2**bits, (groups, OUT)).astype(np.uint8) if zeros else None
        tensor = layout.from_integers(q_IO, scales_GO, zeros_GO, bits=bits, group_size=group_size)
        group_I = np.arange(IN) // group_size
        zero_IO = zeros_GO[group_I].astype(np.float64) if zeros else 2.0 ** (bits - 1)
        value_IO = scales_GO[group_I].astype(np.float64) * (q_IO - zero_IO)
        order = rng.permutation(IN).astype(np.int32) if permuted else None
        if permuted:
            placed_IO = np.empty_like(value_IO)
            placed_IO[order] = value_IO
            value_IO = placed_IO
        tensors.append((tensor, order))
        values.append(value_IO)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[tensor for tensor, _ in tensors])
    if permuted:
        stacked = dataclasses.replace(stacked, permutation=np.stack([order for _, order in tensors]))
    return stacked, np.stack(values)


def finite_differences(function, x_MI, direction_MI, step=1e-3):
    """Σ of the derivative along a direction, by central differences."""
    return (function(x_MI + step * direction_MI) - function(x_MI - step * direction_MI)) / (2 * step)


def error(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_input_s_derivative_is_that_of_the_dequantized_product(case):
    weight, values_LIO = make(*case)
    rng = np.random.default_rng(1)
    x_MI, direction_MI = rng.normal(0.5, 1, (2, ROWS, IN))
    mix_MO = rng.normal(0.3, 1, (ROWS, OUT))
    layer = 1
    scale = float(np.std(x_MI @ values_LIO[layer]))

    def exact(x_MI):
        return float(np.sum(mix_MO * np.tanh(x_MI @ values_LIO[layer] / scale)))

    @jax.jit
    def gradient(x_MI, layer):
        def ours(x_MI):
            y_MO = quantized_matmul(x_MI, weight, layer=layer, kernels="xla")
            return jnp.sum(jnp.asarray(mix_MO, jnp.float32) * jnp.tanh(y_MO / jnp.float32(scale)))

        return jax.grad(ours)(x_MI)

    found_MI = np.asarray(gradient(jnp.asarray(x_MI, jnp.float32), jnp.int32(layer)), np.float64)
    wanted = finite_differences(exact, x_MI, direction_MI)
    assert abs(np.sum(found_MI * direction_MI) - wanted) < 1e-4 * abs(wanted)
    other = np.sum(np.roll(found_MI, 1, axis=1) * direction_MI)  # a derivative in the wrong order must show
    assert abs(other - wanted) > 1e-2 * abs(wanted)


@pytest.mark.parametrize("tile_bytes", [1, 96 * OUT * 4, 2**26])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_of_any_size_give_the_same_product(case, tile_bytes):
    weight, values_LIO = make(*case)
    g_MO = np.random.default_rng(2).normal(0.5, 1, (ROWS, OUT)).astype(np.float32)
    run = functools.partial(transposed.run, unpack=op.unpack, chip="cpu", tile_bytes=tile_bytes)
    found_MI = jax.jit(run)(g_MO, jax.tree.map(jnp.asarray, weight), jnp.int32(2))
    assert error(found_MI, g_MO.astype(np.float64) @ values_LIO[2].T) < LIMIT


@pytest.mark.parametrize("kernel", [mosaic_gpu, mosaic_tpu], ids=["mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_kernel_s_own_layout_gives_the_same_derivative(kernel, bits):
    if not hasattr(kernel, "prepack"):
        pytest.skip("the kernel reads the files' own layout")
    rng = np.random.default_rng(3)
    q_IO = rng.integers(0, 2**bits, (256, 128)).astype(np.uint8)
    scales_GO = rng.uniform(0.5, 1.5, (2, 128)).astype(np.float16)
    zeros_GO = rng.integers(0, 2**bits, (2, 128)).astype(np.uint8)
    weight = layout.from_integers(q_IO, scales_GO, zeros_GO, bits=bits, group_size=128)
    stacked = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), jax.tree.map(jnp.asarray, weight))
    packed = kernel.prepack(stacked)
    assert packed.layout == getattr(kernel, "LAYOUT", "gptq")
    g_MO = rng.normal(0.5, 1, (4, 128)).astype(np.float32)
    found_MI = transposed.run(jnp.asarray(g_MO), packed, jnp.int32(1), unpack=op.unpack, chip="cpu")
    assert error(found_MI, g_MO.astype(np.float64) @ dequantize(weight, np.float64).T) < LIMIT


def test_on_an_accelerator_the_tile_is_in_the_gradient_s_dtype():
    weight, values_LIO = make(4, 64, True, True)
    g_MO = jnp.asarray(np.random.default_rng(4).normal(0.5, 1, (ROWS, OUT)), jnp.bfloat16)
    found_MI = transposed.run(g_MO, weight, 0, unpack=op.unpack, chip="NVIDIA H100 80GB HBM3")
    assert found_MI.dtype == jnp.bfloat16
    assert error(found_MI, np.asarray(g_MO, np.float64) @ values_LIO[0].T) < 2**-7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chip", ["cpu", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("prepacked", [False, True])
def test_dense_derivative(dtype, chip, prepacked):
    rng = np.random.default_rng(5)
    values_LIO = np.asarray(jnp.asarray(rng.normal(0.2, 1, (2, 64, 40)), dtype), np.float64)
    data = jnp.asarray(values_LIO.swapaxes(1, 2), dtype)
    weight = DenseTensor(data, dtype, 64, "transposed")
    weight = prepack_dense(weight, chip="cpu") if prepacked else weight
    x_MI, mix_MO = (jnp.asarray(rng.normal(0.5, 1, (9, n)), jnp.float32) for n in (64, 40))
    found_MI = jax.grad(lambda x: jnp.sum(mix_MO * dense_matmul(x, weight, layer=1, chip=chip)))(x_MI)
    wanted_MI = np.asarray(mix_MO, np.float64) @ values_LIO[1].T
    assert error(found_MI, wanted_MI) < LIMIT
    assert error(found_MI, np.asarray(mix_MO, np.float64) @ values_LIO[0].T) > 0.1


def test_a_large_head_is_widened_in_parts(monkeypatch):
    from pallas_kernels.dense_matmul import xla

    monkeypatch.setattr(xla, "MAX_COPY_BYTES", 64 * 4 * 10)
    rng = np.random.default_rng(6)
    values_OI = np.asarray(jnp.asarray(rng.normal(0.2, 1, (40, 64)), jnp.float16), np.float64)
    weight = DenseTensor(jnp.asarray(values_OI, jnp.float16), "float16", 64, "transposed")
    mix_MO = jnp.asarray(rng.normal(0.5, 1, (9, 40)), jnp.float32)
    found_MI = jax.grad(lambda x: jnp.sum(mix_MO * dense_matmul(x, weight)))(jnp.ones((9, 64), jnp.float32))
    assert error(found_MI, np.asarray(mix_MO, np.float64) @ values_OI) < LIMIT


def test_weights_are_constants():
    weight, _ = make(4, 64, False, False)
    weight = jax.tree.map(jnp.asarray, weight)

    def loss(scales):
        y = quantized_matmul(jnp.ones((2, IN)), dataclasses.replace(weight, scales=scales), layer=0)
        return jnp.sum(y.astype(jnp.float32))

    assert not np.asarray(jax.grad(loss)(weight.scales)).any()

"""Rounding to nearest, against the definition of the format in NumPy float64."""

from pathlib import Path

import numpy as np
import pytest

from converters.huggingface import Checkpoint
from pallas_kernels.quantized_matmul.reference import dequantize
from qwen_jax.errors import CheckpointError
from qwen_jax.quantize.round_to_nearest import quantize_folder, round_to_nearest

rng = np.random.default_rng(0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_each_weight_is_within_half_a_step(bits, group_size, symmetric):
    weight_IO = (rng.normal(size=(160, 24)) + 0.3).astype(np.float32)  # 160 = 2.5 groups of 64
    tensor = round_to_nearest(weight_IO, bits=bits, group_size=group_size, symmetric=symmetric)
    rows = 160 if group_size == -1 else group_size
    step_IO = np.repeat(np.asarray(tensor.scales, np.float64), rows, axis=0)[:160]
    error_IO = np.abs(dequantize(tensor) - weight_IO)
    # float16 rounds a scale by up to 2⁻¹¹, which moves the far end of the grid by up to 2^bits · 2⁻¹¹ steps
    assert (error_IO <= step_IO * (0.5 + 2**bits * 2**-11)).all()
    assert (tensor.zeros is None) == symmetric
    assert error_IO.max() > 0.3 * step_IO.min()  # and is not exact: the test would see a grid of the wrong width


def test_asymmetric_groups_fit_skewed_weights_better():
    weight_IO = rng.uniform(-0.1, 1.0, (64, 16)).astype(np.float32)
    errors = [
        np.linalg.norm(dequantize(round_to_nearest(weight_IO, bits=4, group_size=64, symmetric=symmetric)) - weight_IO)
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_groups_and_columns_have_finite_scales_and_stay_zero(symmetric):
    weight_IO = rng.normal(size=(128, 8)).astype(np.float32)
    weight_IO[:64, 3] = 0
    weight_IO[:, 5] = 0
    weight_IO[64:, 6] = 1e-9  # its scale is below float16's smallest number
    tensor = round_to_nearest(weight_IO, bits=4, group_size=64, symmetric=symmetric)
    assert np.isfinite(tensor.scales).all() and (np.asarray(tensor.scales) > 0).all()
    dequantized_IO = dequantize(tensor)
    assert (dequantized_IO[weight_IO == 0] == 0).all()
    assert np.abs(dequantized_IO[64:, 6]).max() < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e6])
def test_weights_that_no_float16_scale_can_hold_are_an_error(bad):
    weight_IO = np.ones((64, 8), np.float32)
    weight_IO[3, 4] = bad
    with pytest.raises(ValueError, match="not finite, or too large for float16"):
        round_to_nearest(weight_IO, bits=4, group_size=64)


def test_a_quantized_folder_is_refused(tmp_path):
    folder = Path(__file__).parents[2] / "golden" / "qwen2-int4-per-channel" / "quantized"
    with pytest.raises(CheckpointError, match=r"is quantized already .*; expected a float"):
        quantize_folder(folder, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_folder_keeps_what_is_not_rounded(tmp_path):
    source = Path(__file__).parents[2] / "golden" / "qwen2-int4-g64-actorder-asym" / "source"
    quantize_folder(source, tmp_path, bits=8, group_size=128, symmetric=True)
    before, after = Checkpoint(source), Checkpoint(tmp_path)
    assert after.quantization is not None and after.quantization.checkpoint_format == "gptq"
    for path in before.paths:
        if path.endswith(".scale"):
            assert np.array_equal(before.read_vector(path), after.read_vector(path))
            continue
        one, other = before.read(path), after.read(path)
        assert (one.bias is None) == (other.bias is None)
        assert one.bias is None or np.array_equal(one.bias, other.bias)
        if path.startswith("layers."):
            error_IO = np.abs(dequantize(other.weight) - one.weight.data.T)
            assert 0 < error_IO.max() <= 0.51 * np.asarray(other.weight.scales, np.float64).max()
        else:
            assert np.array_equal(one.weight.data, other.weight.data)

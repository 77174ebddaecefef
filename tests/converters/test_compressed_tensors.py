"""compressed-tensors' pack-quantized against its definition: one bit stream an output, shifted by 2^(bits − 1)."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import compressed_tensors
from converters.huggingface import Checkpoint, write
from pallas_kernels.quantized_matmul import layout
from pallas_kernels.quantized_matmul.reference import dequantize
from qwen_jax.config import QuantizationConfig
from qwen_jax.errors import CheckpointError
from tests.edited import GOLDEN, edited, round_to_nearest, weights_file


def stream(signed, bits):
    """Signed integers as one long number, 32 bits a word: llm-compressor's packing of a row."""
    number = sum((int(value) + 2 ** (bits - 1)) << (place * bits) for place, value in enumerate(signed))
    return [(number >> (32 * word)) % 2**32 for word in range(-(-len(signed) * bits // 32))]


def words(rows, bits):
    return np.array([stream(row, bits) for row in rows], np.uint32).view(np.int32)


def settings_of(bits=4, group_size=32, symmetric=True):
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "channel" if group_size == -1 else "group"}
    weights |= {"type": "int"} | ({} if group_size == -1 else {"group_size": group_size})
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([4, 8]),
    st.integers(1, 80),
    st.integers(1, 9),
    st.sampled_from([-1, 16, 32]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_reading_and_writing(bits, inputs, outputs, group_size, symmetric, act_order, seed):
    random, half = np.random.default_rng(seed), 2 ** (bits - 1)
    size = inputs if group_size == -1 else min(group_size, inputs)
    groups = -(-inputs // size)
    q_OI = random.integers(-half, half, (outputs, inputs))
    zero_OG = np.zeros((outputs, groups), int) if symmetric else random.integers(-half, half, (outputs, groups))
    scale_OG = random.uniform(0.5, 2, (outputs, groups)).astype(ml_dtypes.bfloat16)
    g_idx = np.arange(inputs) // size
    if act_order:
        g_idx = random.permutation(g_idx)
    parts = {
        "weight_packed": words(q_OI, bits),
        "weight_scale": scale_OG,
        "weight_shape": np.array([outputs, inputs], np.int64),
    }
    if not symmetric:
        parts["weight_zero_point"] = np.ascontiguousarray(words(zero_OG.T, bits).T)
    if act_order:
        parts["weight_g_idx"] = g_idx.astype(np.int32)
    config = QuantizationConfig.from_dict(settings_of(bits, group_size, symmetric))
    chosen = config.for_module("model.layers.0.mlp.up_proj")
    weight = compressed_tensors.read(parts, chosen, config, inputs, "file: module")
    want_OI = scale_OG.astype(np.float64)[:, g_idx] * (q_OI - zero_OG[:, g_idx])
    np.testing.assert_array_equal(dequantize(weight), want_OI.T)
    assert weight.packed.flags.c_contiguous and weight.scales.flags.c_contiguous
    back = compressed_tensors.write(weight, config)
    if act_order and weight.permutation is None:
        del parts["weight_g_idx"]  # the drawn order was the natural one
    assert set(back) == set(parts)
    for name, part in parts.items():
        assert back[name].dtype == part.dtype and np.array_equal(back[name], part), name
    shapes = compressed_tensors.shapes(chosen, inputs, outputs)
    assert all(part.shape == shapes[name] for name, part in parts.items())


def folder_of(tmp_path, bits=4, group_size=64, symmetric=True):
    source = Checkpoint(GOLDEN / "qwen2-int4-per-channel/source")
    quantization = settings_of(bits, group_size, symmetric)
    chosen = QuantizationConfig.from_dict(quantization)

    def parameters():
        for path in source.paths:
            if path.endswith(".scale"):
                yield path, source.read_vector(path)
            elif chosen.for_module(source.module_name(path)) is None:
                yield path, source.read(path)
            else:
                module = source.read(path)
                weight = round_to_nearest(module.weight.data.T, bits, group_size, symmetric)
                yield path, type(module)(weight, module.bias)

    raw = json.loads((source.folder / "config.json").read_text())
    write(tmp_path / "packed", parameters(), config=raw, quantization=quantization)
    return tmp_path / "packed"


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 64, True), (4, 128, False), (8, -1, True)])
def test_a_folder(tmp_path, bits, group_size, symmetric):
    folder = folder_of(tmp_path, bits, group_size, symmetric)
    assert not (folder / "quantize_config.json").exists()
    checkpoint, source = Checkpoint(folder), Checkpoint(GOLDEN / "qwen2-int4-per-channel/source")
    spec = checkpoint.spec("layers.0.mlp.down")
    assert (spec.bits, spec.has_zeros, spec.kind) == (bits, not symmetric, "quantized")
    assert checkpoint.spec("lm_head").kind == "dense"
    assert checkpoint.read("layers.0.attention.query").bias is not None
    for path in ("layers.0.mlp.down", "layers.1.attention.value"):
        weight, data = dequantize(checkpoint.read(path).weight), source.read(path).weight.data.T
        assert np.linalg.norm(weight - data) < (0.2 if bits == 4 else 0.02) * np.linalg.norm(data)


def test_errors(tmp_path):
    folder = folder_of(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    file = weights_file(folder)
    content = file.read_bytes()

    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lm_head: the file holds a float weight, but by .* it has 4 bits"):
        Checkpoint(folder)

    config["quantization_config"] = settings_of(4, 128)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_scale: shape \[128, 2\], expected \[128, 1\] for 4 bits"):
        Checkpoint(folder)

    config["quantization_config"] = settings_of(4, 64, symmetric=False)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has no weight_zero_point, which compressed-tensors needs"):
        Checkpoint(folder)
    assert file.read_bytes() == content


def test_gptq_tensors_under_compressed_tensors_settings(tmp_path):
    folder = edited("qwen2-int4-per-channel", tmp_path, config={"quantization_config": settings_of()})
    (folder / "quantize_config.json").unlink()
    with pytest.raises(
        CheckpointError, match="the file holds qweight, but by .* it is of quant_method 'compressed-tens"
    ):
        Checkpoint(folder)


def test_a_quantized_embedding_is_refused(tmp_path):
    extra = {"model.embed_tokens.qweight": np.zeros((16, 384), np.int32), "model.embed_tokens.weight": None}
    with pytest.raises(
        CheckpointError, match="model.embed_tokens: is quantized, which is not supported for the embedding"
    ):
        Checkpoint(edited("qwen2-int4-per-channel", tmp_path, tensors=extra))


def test_a_shape_that_contradicts():
    config = QuantizationConfig.from_dict(settings_of(8, -1))
    weight = layout.from_integers(np.zeros((32, 8)), np.ones((1, 8)), bits=8)
    parts = compressed_tensors.write(weight, config) | {"weight_shape": np.array([8, 31])}
    with pytest.raises(CheckpointError, match=r"module.weight_shape: is \[8, 31\], expected \[8, 32\]"):
        compressed_tensors.read(parts, config.for_module("m.0.x"), config, 32, "file: module")


def test_zero_points_in_a_symmetric_checkpoint_are_not_written():
    weight = layout.from_integers(np.zeros((32, 8)), np.ones((1, 8)), np.full((1, 8), 3), bits=4)
    with pytest.raises(ValueError, match="symmetric is true, but the weight has zero-points"):
        compressed_tensors.write(weight, QuantizationConfig.from_dict(settings_of()))

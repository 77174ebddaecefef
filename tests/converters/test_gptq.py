"""GPTQ tensors: every golden file against an independent dequantization, conventions, act-order, round trips."""

import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import gptq
from converters.huggingface import Checkpoint
from pallas_kernels.quantized_matmul import layout
from pallas_kernels.quantized_matmul.reference import dequantize
from qwen_jax.config import QuantizationConfig
from qwen_jax.errors import CheckpointError
from tests.edited import CASES, GOLDEN, edited, tensors_of

SYMMETRIC, ASYMMETRIC = "qwen2-int4-per-channel", "qwen2-int4-g64-actorder-asym"
EIGHTS = np.uint32(0x88888888).view(np.int32)


def by_hand(tensors, module, bits, minus_one):
    """w[i, o] = scale · (q − zero), a row at a time from the file's own words."""
    qweight, qzeros = (tensors[f"{module}.{part}"].view(np.uint32) for part in ("qweight", "qzeros"))
    scales, g_idx = tensors[f"{module}.scales"].astype(np.float64), tensors[f"{module}.g_idx"]
    each, mask = 32 // bits, 2**bits - 1
    columns = np.arange(scales.shape[1])
    rows = []
    for i, group in enumerate(g_idx):
        q_O = (qweight[i // each] >> np.uint32(bits * (i % each))) & mask
        stored_O = (qzeros[group, columns // each] >> (bits * (columns % each)).astype(np.uint32)) & mask
        zero_O = (stored_O.astype(np.int64) + minus_one) & mask
        rows.append(scales[group] * (q_O.astype(np.int64) - zero_O))
    return np.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_golden_files_against_a_dequantization_by_hand(case):
    checkpoint, tensors = Checkpoint(GOLDEN / case / "quantized"), tensors_of(GOLDEN / case / "quantized")
    bits, minus_one = (8 if "int8" in case else 4), 0 if "-v2-" in case else 1
    count = 0
    for path in checkpoint.paths:
        if path.endswith(".scale") or checkpoint.spec(path).kind == "dense":
            continue
        found = checkpoint.read(path).weight
        module = checkpoint.module_name(path)
        np.testing.assert_array_equal(dequantize(found), by_hand(tensors, module, bits, minus_one))
        assert not np.array_equal(dequantize(found), by_hand(tensors, module, bits, 1 - minus_one))
        assert (found.permutation is not None) == ("actorder" in case)
        count += 1
    assert count == len([name for name in tensors if name.endswith(".qweight")])


def config(**changes):
    return QuantizationConfig.from_dict({"bits": 4, "group_size": 32} | changes)


def read(parts, quantization, in_features):
    return gptq.read(parts, quantization.for_module("layers.0.x"), quantization, in_features, "file: module")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(layout.BITS),
    st.integers(1, 100),
    st.sampled_from([-1, 1, 16, 32, 64]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["gptq", "gptq_v2", "gptq_p"]),
    st.sampled_from(["", "gptqmodel:7.7.0"]),
    st.integers(0, 2**31),
)
def test_write_then_read_gives_the_same(bits, in_features, group_size, act_order, has_zeros, fmt, quantizer, seed):
    if fmt == "gptq_p" and bits == 3:
        return
    random = np.random.default_rng(seed)
    size = in_features if group_size == -1 else min(group_size, in_features)
    shape = (-(-in_features // size), 5)
    zeros = random.integers(0, 2**bits, shape) if has_zeros else None
    q_IO, scales = random.integers(0, 2**bits, (in_features, 5)), random.uniform(0.5, 2, shape).astype(np.float16)
    permutation = None
    if act_order:
        # as a stable sort by group leaves it: increasing inside each group
        shuffled = random.permutation(in_features)
        permutation = np.concatenate([np.sort(shuffled[i : i + size]) for i in range(0, in_features, size)])
    weight = layout.from_integers(q_IO, scales, zeros, permutation, bits=bits, group_size=size)
    quantization = config(bits=bits, group_size=group_size, checkpoint_format=fmt, meta={"quantizer": [quantizer]})
    quantization = dataclasses.replace(quantization, sym=not has_zeros)
    parts = gptq.write(weight, quantization)
    assert all(part.flags.c_contiguous for part in parts.values())
    shapes = gptq.shapes(quantization.for_module("layers.0.x"), in_features, 5)
    assert {name: part.shape for name, part in parts.items()} == shapes
    back = read(parts, quantization, in_features)
    np.testing.assert_array_equal(dequantize(back), dequantize(weight))
    if zeros is None:
        assert back.zeros is None
    if permutation is not None:  # rows sorted by group, inside a group by input
        found = np.arange(in_features) if back.permutation is None else back.permutation
        np.testing.assert_array_equal(found, permutation)
    again = gptq.write(back, quantization)
    assert all(np.array_equal(again[name], part) and again[name].dtype == part.dtype for name, part in parts.items())


# Zero-points ---------------------------------------------------------------------------------------------------------


def all_eights(tensors):
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name][:] = EIGHTS


@pytest.mark.parametrize("label", [None, "gptq_v2"])
def test_mislabelled_zeros_of_a_symmetric_file_are_read_as_stored(tmp_path, caplog, label):
    folder = edited(SYMMETRIC, tmp_path, quantize={"checkpoint_format": label or "gptq"}, tensors=all_eights)
    with caplog.at_level(logging.WARNING, "qwen_jax"):
        checkpoint, golden = Checkpoint(folder), Checkpoint(GOLDEN / SYMMETRIC / "quantized")
        for path in ("layers.0.mlp.up", "layers.1.attention.query"):
            assert checkpoint.read(path).weight.zeros is None and checkpoint.spec(path).zero_convention == "v2"
            np.testing.assert_array_equal(checkpoint.read(path).weight.packed, golden.read(path).weight.packed)
    assert ("stored as they are, although checkpoint_format is 'gptq'" in caplog.text) == (label is None)


def test_zeros_stored_minus_one_under_a_v2_label(tmp_path, caplog):
    checkpoint = Checkpoint(edited(SYMMETRIC, tmp_path, quantize={"checkpoint_format": "gptq_v2"}))
    with caplog.at_level(logging.WARNING, "qwen_jax"):
        assert checkpoint.read("layers.0.mlp.up").weight.zeros is None
    assert "layers.0.mlp.up_proj.qzeros" in caplog.text and "minus 1" in caplog.text


def test_an_asymmetric_file_is_never_guessed_about(tmp_path):
    checkpoint = Checkpoint(edited(ASYMMETRIC, tmp_path, tensors=all_eights))
    assert (checkpoint.read("layers.0.mlp.up").weight.zeros == 9).all()


def test_a_zero_point_of_0_in_v1():
    zeros = np.array([[0, 5, 0, 0, 15, 1, 8, 3]])
    weight = layout.from_integers(np.full((32, 8), 7), np.ones((1, 8), np.float16), zeros, bits=4)
    borrowing, wrapping = config(sym=False, meta={"quantizer": ["gptqmodel:7.7.0"]}), config(sym=False)
    words = {each: gptq.write(weight, each)["qzeros"].view(np.uint32)[0, 0] for each in (borrowing, wrapping)}
    # 0x3_8_1_f_0_0_5_0: GPTQModel subtracts 0x11111111 from the whole word, others 1 from each digit.
    assert words == {borrowing: 0x381F0050 - 0x11111111, wrapping: 0x270EFF4F}
    for each in (borrowing, wrapping):
        np.testing.assert_array_equal(read(gptq.write(weight, each), each, 32).zeros, zeros)


def test_zero_scales_are_read(tmp_path):
    def one_group_of_nothing(tensors):
        tensors["transformer.h.0.mlp.w1.scales"][1] = 0

    folder = edited("qwen1-int4-g32", tmp_path, tensors=one_group_of_nothing)
    weight = dequantize(Checkpoint(folder).read("layers.0.mlp.up").weight)
    assert np.isfinite(weight).all() and not weight[32:64].any() and weight[:32].any()


# Group indices -------------------------------------------------------------------------------------------------------


def test_no_group_indices_means_the_natural_order(tmp_path):
    def remove(tensors):
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    golden = Checkpoint(GOLDEN / "qwen1-int4-g32/quantized").read("layers.0.mlp.up").weight
    found = Checkpoint(edited("qwen1-int4-g32", tmp_path, tensors=remove)).read("layers.0.mlp.up").weight
    np.testing.assert_array_equal(dequantize(found), dequantize(golden))


def test_all_zero_group_indices_mean_the_natural_order_and_are_logged(tmp_path, caplog):
    def clear(tensors):
        for name in tensors:
            if name.endswith("g_idx"):
                tensors[name][:] = 0

    golden = Checkpoint(GOLDEN / "qwen1-int4-g32/quantized").read("layers.0.mlp.up").weight
    folder = edited("qwen1-int4-g32", tmp_path, tensors=clear)
    with caplog.at_level(logging.WARNING, "qwen_jax"):
        found = Checkpoint(folder).read("layers.0.mlp.up").weight
    np.testing.assert_array_equal(dequantize(found), dequantize(golden))
    assert "w1.g_idx: is all zero although there are 4 groups" in caplog.text


@pytest.mark.parametrize("index", [[0] * 40 + [1] * 24, [-1] + [0] * 31 + [1] * 32, [0] * 32 + [2] * 32], ids=len)
def test_groups_of_a_wrong_size_are_an_error(index):
    parts = gptq.write(layout.from_integers(np.zeros((64, 8)), np.ones((2, 8)), bits=4, group_size=32), config())
    with pytest.raises(
        CheckpointError, match=r"^file: module.g_idx: .*expected 2 groups of 32 .*group_size comes from"
    ):
        read(parts | {"g_idx": np.array(index, np.int32)}, config(), 64)


def test_the_tensor_decides_about_act_order_not_the_flag(tmp_path):
    checkpoint = Checkpoint(edited(ASYMMETRIC, tmp_path, quantize={"desc_act": False}))
    assert checkpoint.spec("layers.0.mlp.down").has_permutation
    golden = Checkpoint(GOLDEN / ASYMMETRIC / "quantized").read("layers.0.mlp.down").weight
    np.testing.assert_array_equal(dequantize(checkpoint.read("layers.0.mlp.down").weight), dequantize(golden))


def test_stacked_or_prepacked_tensors_are_not_written():
    weight = layout.from_integers(np.zeros((2, 32, 8)), np.ones((2, 1, 8)), bits=4)
    with pytest.raises(ValueError, match="expected one matrix in layout 'gptq'"):
        gptq.write(weight, config())

"""Opening and reading a folder: what has a place, what contradicts what, how much is read."""

import json
import logging
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import safetensors_files
from converters.huggingface import Checkpoint
from pallas_kernels.quantized_matmul.reference import dequantize
from qwen_jax.errors import CheckpointError
from tests.edited import CASES, GOLDEN, edited, rounded, tensors_of, weights_file

QWEN1, PER_CHANNEL = "qwen1-int4-g32", "qwen2-int4-per-channel"
ACTORDER, TIED = "qwen2-int4-g64-actorder-asym", "qwen3-gptqmodel-int4-g32-dynamic-tied"


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    return message


@pytest.mark.parametrize("case", CASES)
def test_every_float_tensor_of_a_golden_source_is_read_as_it_is(case):
    checkpoint, tensors = Checkpoint(GOLDEN / case / "source"), tensors_of(GOLDEN / case / "source")
    assert checkpoint.quantization is None
    for path in checkpoint.paths:
        name = checkpoint.module_name(path)
        if path.endswith(".scale"):
            np.testing.assert_array_equal(checkpoint.read_vector(path), tensors.pop(f"{name}.weight"))
            continue
        module, spec = checkpoint.read(path), checkpoint.spec(path)
        np.testing.assert_array_equal(module.weight.data, tensors.pop(f"{name}.weight"))
        assert (spec.kind, spec.in_features, spec.out_features) == ("dense", *module.weight.data.shape[::-1])
        assert spec.has_bias == (module.bias is not None) == (f"{name}.bias" in tensors)
        if module.bias is not None:
            np.testing.assert_array_equal(module.bias, tensors.pop(f"{name}.bias"))
    assert not tensors


def test_specs_agree_with_what_is_read():
    checkpoint = Checkpoint(GOLDEN / ACTORDER / "quantized")
    digests = set()
    for path in checkpoint.paths:
        if path.endswith(".scale") or checkpoint.spec(path).kind == "dense":
            continue
        spec, weight = checkpoint.spec(path), checkpoint.read(path).weight
        assert (spec.bits, spec.group_size, spec.dtype) == (weight.bits, weight.group_size, weight.scales.dtype.name)
        assert (spec.in_features, spec.out_features) == (weight.in_features, weight.out_features)
        assert spec.has_zeros == (weight.zeros is not None) and spec.has_permutation
        digests.add((spec.permutation_digest, weight.permutation.tobytes()))
    assert len({digest for digest, _ in digests}) == len({permutation for _, permutation in digests}) == len(digests)
    assert checkpoint.spec("layers.0.attention.key").permutation_digest == (
        checkpoint.spec("layers.0.attention.query").permutation_digest
    )  # the same inputs in the same order: such can be fused


def test_float16_and_bfloat16_stay_what_they_are(tmp_path):
    def narrow(tensors):
        for name in tensors:
            if name.endswith("scales") or "embed" in name:
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16 if ".1." in name else np.float16)

    checkpoint = Checkpoint(edited(PER_CHANNEL, tmp_path, tensors=narrow))
    assert checkpoint.read("layers.0.mlp.up").weight.scales.dtype == np.float16
    assert checkpoint.read("layers.1.mlp.up").weight.scales.dtype == ml_dtypes.bfloat16
    assert checkpoint.spec("layers.1.mlp.up").dtype == "bfloat16" and checkpoint.spec("embedding").dtype == "float16"


def test_a_file_without_dtype_has_that_of_its_tensors(tmp_path):
    def narrow(tensors):
        tensors |= {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}

    folder = edited(PER_CHANNEL, tmp_path, "source", config={"torch_dtype": None}, tensors=narrow)
    assert Checkpoint(folder).config.dtype == "bfloat16"


def test_buffers_of_old_files_are_passed_over(tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    assert Checkpoint(edited(PER_CHANNEL, tmp_path, tensors=buffers)).read("layers.0.mlp.up")


def test_zero_biases_are_no_biases_and_others_have_no_place(tmp_path):
    assert Checkpoint(GOLDEN / PER_CHANNEL / "quantized").read("layers.0.mlp.up").bias is None
    bias = np.zeros(192, np.float32)
    bias[7] = 1e-3
    folder = edited(PER_CHANNEL, tmp_path, tensors={"model.layers.0.mlp.up_proj.bias": bias})
    refused(folder, "model.layers.0.mlp.up_proj.bias: is not zero", "qwen2")


# Names and shapes ----------------------------------------------------------------------------------------------------


def test_missing_and_homeless_tensors_are_both_named(tmp_path):
    def rename(tensors):
        tensors["model.layers.0.mlp.up_project.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    folder = edited(PER_CHANNEL, tmp_path, "source", tensors=rename)
    refused(
        folder, "without a place: model.layers.0.mlp.up_project.weight", "tensor: model.layers.0.mlp.up_proj.weight"
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_more_or_fewer_layers_than_configured(tmp_path, layers):
    refused(edited(PER_CHANNEL, tmp_path, config={"num_hidden_layers": layers}), f"a qwen2 model of {layers} layers")


@pytest.mark.parametrize(
    ("kind", "name", "shape", "expected"),
    [
        ("source", "model.layers.1.mlp.up_proj.weight", (192, 127), "[192, 127], expected [192, 128] by"),
        ("source", "model.norm.weight", (127,), "[127], expected [128]"),
        ("source", "model.embed_tokens.weight", (383, 128), "[383, 128], expected [384, 128]"),
        ("source", "model.layers.0.self_attn.q_proj.bias", (64,), "[64], expected [128]"),
        ("quantized", "model.layers.1.mlp.up_proj.qweight", (17, 192), "[17, 192], expected [16, 192] for 4 bits"),
        (
            "quantized",
            "model.layers.1.mlp.up_proj.scales",
            (2, 192),
            "expected [1, 192] for 4 bits and ceil(128 / 128) = 1",
        ),
        ("quantized", "model.layers.1.mlp.up_proj.qzeros", (1, 23), "[1, 23], expected [1, 24]"),
        ("quantized", "model.layers.1.mlp.up_proj.g_idx", (127,), "[127], expected [128]"),
    ],
)
def test_wrong_shapes(tmp_path, kind, name, shape, expected):
    def reshape(tensors):
        tensors[name] = np.zeros(shape, tensors[name].dtype)

    folder = edited(PER_CHANNEL, tmp_path, kind, tensors=reshape)
    refused(folder, str(weights_file(folder)), f"{name}: shape", expected)


@pytest.mark.parametrize(("part", "dtype"), [("qweight", np.int64), ("scales", np.int32), ("g_idx", np.float32)])
def test_wrong_dtypes(tmp_path, part, dtype):
    name = f"model.layers.0.mlp.up_proj.{part}"

    def cast(tensors):
        tensors[name] = tensors[name].astype(dtype)

    refused(edited(PER_CHANNEL, tmp_path, tensors=cast), f"{name}: dtype", "expected")


def test_a_quantized_module_lacks_a_part(tmp_path):
    folder = edited(PER_CHANNEL, tmp_path, tensors={"model.layers.0.mlp.up_proj.qzeros": None})
    refused(folder, "model.layers.0.mlp.up_proj: has no qzeros")


def test_missing_biases(tmp_path):
    folder = edited(PER_CHANNEL, tmp_path, "source", tensors={"model.layers.0.self_attn.q_proj.bias": None})
    refused(folder, "q_proj.bias: is missing", "attention_bias")


# Settings and tensors that contradict each other ---------------------------------------------------------------------


def test_wrong_bits_or_groups_name_module_and_rule(tmp_path):
    refused(
        edited(QWEN1, tmp_path / "a", quantize={"bits": 8}), "qweight: shape [16, 384]", "8 bits", "quantize_config"
    )
    refused(edited(QWEN1, tmp_path / "b", quantize={"group_size": 64}), "ceil(128 / 64) = 2 groups")
    rules = {"+:.*h.1.attn.c_proj": {"bits": 8}}
    refused(edited(QWEN1, tmp_path / "c", quantize={"dynamic": rules}), "h.1.attn.c_proj", "dynamic '+:.*h.1.attn")


def test_a_rule_for_a_module_that_is_otherwise(tmp_path):
    rules = {"-:.*h.1.attn.c_proj": {}}
    folder = edited(QWEN1, tmp_path / "a", quantize={"dynamic": rules})
    refused(folder, "h.1.attn.c_proj: the file holds qweight, but by", "a float module")
    folder = edited(QWEN1, tmp_path / "b", quantize={"lm_head": True})
    refused(folder, "lm_head: the file holds a float weight, but by", "it has 4 bits")


def test_quantized_without_settings(tmp_path):
    folder = edited(QWEN1, tmp_path, config={"quantization_config": None})
    (folder / "quantize_config.json").unlink()
    refused(folder, "is quantized, but there is neither quantize_config.json nor")


def test_a_module_both_float_and_quantized(tmp_path):
    extra = {"transformer.h.0.mlp.w1.weight": np.zeros((192, 128), np.float32)}
    refused(edited(QWEN1, tmp_path, tensors=extra), "mlp.w1: has both weight and qweight")


@pytest.mark.parametrize("place", ["config.json alone", "quantize_config.json alone", "three keys"])
def test_settings_may_live_in_one_place_and_be_few(tmp_path, place):
    def few(content):
        for name in set(content) - {"bits", "group_size", "quant_method"}:
            del content[name]

    folder = edited(
        QWEN1,
        tmp_path,
        config={"quantization_config": None} if place.startswith("quantize") else None,
        quantize=few if place == "three keys" else None,
    )
    if place.startswith("config"):
        (folder / "quantize_config.json").unlink()
    checkpoint, golden = Checkpoint(folder), Checkpoint(GOLDEN / QWEN1 / "quantized")
    for path in ("layers.0.attention.qkv", "layers.2.mlp.down"):
        assert checkpoint.spec(path) == golden.spec(path)
        found, wanted = checkpoint.read(path).weight, golden.read(path).weight
        np.testing.assert_array_equal(dequantize(found), dequantize(wanted))


# Rounded models: short last groups, modules that differ --------------------------------------------------------------


def same_as_source(case, folder, bits=4):
    """How far a rounded model's matrices are from the source's, in scales."""
    found, source = Checkpoint(folder), Checkpoint(GOLDEN / case / "source")
    kinds = {}
    for path in found.paths:
        if path.endswith(".scale"):
            continue
        weight, data = found.read(path).weight, source.read(path).weight.data
        spec = found.spec(path)
        kinds[path] = (spec.bits, spec.group_size)
        if spec.kind == "dense":
            np.testing.assert_array_equal(weight.data, data)
        else:
            steps_IO = np.repeat(weight.scales.astype(np.float64), weight.group_size, axis=0)[: weight.in_features]
            assert (np.abs(dequantize(weight) - data.T) <= 0.51 * steps_IO + 1e-6).mean() > 0.98
    return kinds


def test_a_short_last_group(tmp_path):
    folder = rounded(ACTORDER, tmp_path, {"bits": 4, "group_size": 128, "sym": False})
    kinds = same_as_source(ACTORDER, folder)
    assert kinds["layers.0.mlp.down"] == (4, 128)
    assert Checkpoint(folder).read("layers.0.mlp.down").weight.scales.shape == (3, 128)


@pytest.mark.parametrize("lm_head", [False, True])
def test_modules_that_differ(tmp_path, lm_head):
    rules = {"-:.*\\.0\\.mlp\\.down_proj": {}, "+:.*\\.1\\.self_attn\\.q_proj": {"bits": 8, "group_size": 64}}
    quantization = {"bits": 4, "group_size": -1, "dynamic": rules, "lm_head": lm_head}
    kinds = same_as_source(PER_CHANNEL, rounded(PER_CHANNEL, tmp_path, quantization))
    assert kinds["layers.0.mlp.down"] == (None, None) and kinds["layers.1.mlp.down"] == (4, 192)
    assert kinds["layers.1.attention.query"] == (8, 64) and kinds["layers.1.attention.key"] == (4, 128)
    assert kinds["lm_head"] == ((4, 128) if lm_head else (None, None))


def test_modules_in_block_to_quantize(tmp_path):
    inside = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    ]
    quantization = {"bits": 4, "group_size": -1, "modules_in_block_to_quantize": inside}
    kinds = same_as_source(PER_CHANNEL, rounded(PER_CHANNEL, tmp_path, quantization))
    assert kinds["layers.0.mlp.down"] == kinds["layers.1.mlp.down"] == (None, None)
    assert kinds["layers.1.mlp.up"] == (4, 128)


# Heads ---------------------------------------------------------------------------------------------------------------


def test_a_tied_head_is_the_embedding(tmp_path):
    tensors = {"lm_head.weight": None}
    checkpoint = Checkpoint(edited(PER_CHANNEL, tmp_path / "a", config={"tie_word_embeddings": True}, tensors=tensors))
    assert "lm_head" not in checkpoint.paths
    refused(edited(PER_CHANNEL, tmp_path / "b", tensors=tensors), "lm_head.weight is missing", "tie_word_embeddings")


def test_a_tied_head_that_is_there_all_the_same(tmp_path):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    tie = {"tie_word_embeddings": True}
    checkpoint = Checkpoint(edited(PER_CHANNEL, tmp_path / "a", config=tie, tensors=copy))
    assert "lm_head" not in checkpoint.paths and checkpoint.read("embedding").weight.out_features == 384
    other = Checkpoint(edited(PER_CHANNEL, tmp_path / "b", config=tie))  # its head is one of its own
    with pytest.raises(CheckpointError, match="lm_head.weight is not model.embed_tokens.weight"):
        other.read("embedding")


# Files ---------------------------------------------------------------------------------------------------------------


def sharded(target, case=PER_CHANNEL):
    """A golden folder cut into two shards with an index."""
    folder = edited(case, target)
    file = weights_file(folder)
    tensors = load_file(file)
    file.unlink()
    weight_map = {}
    for number in (1, 2):
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
        save_file(part, folder / f"model-0000{number}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, weight_map


def test_shards(tmp_path):
    folder, _ = sharded(tmp_path)
    shutil.copy(GOLDEN / ACTORDER / "source/model.safetensors", folder)  # the index decides, not this
    found = Checkpoint(folder).read("layers.0.mlp.up").weight
    golden = Checkpoint(GOLDEN / PER_CHANNEL / "quantized").read("layers.0.mlp.up").weight
    np.testing.assert_array_equal(found.packed, golden.packed)


def test_a_missing_shard(tmp_path):
    folder, _ = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors: no such file, but model.safetensors.index.json puts")


def test_an_index_of_another_checkpoint(tmp_path):
    folder, weight_map = sharded(tmp_path)
    moved = dict.fromkeys(weight_map, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    refused(folder, "model-00001-of-00002.safetensors:", "is not in it, but model.safetensors.index.json says so")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refused(folder, "names '../a.safetensors', expected a file in the same folder")


@pytest.mark.parametrize("size", [4, 100, 100_000, -1])
def test_a_truncated_file(tmp_path, size):
    folder = edited(PER_CHANNEL, tmp_path)
    file = weights_file(folder)
    content = file.read_bytes()
    file.write_bytes(content[:size])
    refused(folder, f"{file}: has {len(content[:size])} bytes", "download it again")


def test_a_file_that_is_no_safetensors_file(tmp_path):
    folder = edited(PER_CHANNEL, tmp_path)
    file = weights_file(folder)
    for content, message in (
        (b"x" * 100, "is no"),
        (b"[]", "its header is a list"),
        (b'{"a": {}}', "a: its header entry is {}"),
    ):
        file.write_bytes(len(content).to_bytes(8, "little") + content)
        refused(folder, str(file), message, "download it again")


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    folder = edited(PER_CHANNEL, tmp_path)
    weights_file(folder).rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin: pickled weights are not read", "run any code", "convert them to safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no *.safetensors file")


def test_several_files_without_an_index(tmp_path):
    folder = edited(PER_CHANNEL, tmp_path)
    shutil.copy(weights_file(folder), folder / "copy.safetensors")
    refused(folder, "several safetensors files (copy.safetensors, gptq_model-4bit--1g.safetensors)")


# How much is read ----------------------------------------------------------------------------------------------------


def test_opening_reads_no_weights_and_reading_one_reads_no_other(monkeypatch):
    read = []
    original = safetensors_files.StoredTensor.read
    monkeypatch.setattr(
        safetensors_files.StoredTensor, "read", lambda self, *rows: read.append(self.name) or original(self, *rows)
    )
    checkpoint = Checkpoint(GOLDEN / ACTORDER / "quantized")
    checkpoint.spec("layers.0.mlp.up")
    assert not [name for name in read if not name.endswith((".bias", ".qzeros", ".g_idx"))]
    read.clear()
    checkpoint.read("layers.0.mlp.up")
    assert {name.rpartition(".")[0] for name in read} == {"model.layers.0.mlp.up_proj"}


def test_peak_memory_of_reading_is_a_few_times_the_largest_module():
    checkpoint = Checkpoint(GOLDEN / TIED / "quantized")
    largest = max(checkpoint.nbytes(path) for path in checkpoint.paths)
    whole = sum(checkpoint.nbytes(path) for path in checkpoint.paths)
    tracemalloc.start()
    for path in checkpoint.paths:
        checkpoint.read_vector(path) if path.endswith(".scale") else checkpoint.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * largest + 65_536 < whole


def test_unused_rules_are_told(caplog):
    with caplog.at_level(logging.INFO, "qwen_jax"):
        Checkpoint(GOLDEN / TIED / "quantized")
    assert caplog.text.count("matches no module") == 2


def test_paths_that_are_none():
    checkpoint = Checkpoint(GOLDEN / PER_CHANNEL / "source")
    for call in (checkpoint.read, checkpoint.spec, checkpoint.read_vector):
        with pytest.raises(ValueError, match="'layers.9.mlp.up' is no"):
            call("layers.9.mlp.up")

"""Folders written again: the same tensors to the byte, complete or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from converters.huggingface import Checkpoint, Module, write
from pallas_kernels.dense_matmul.tensor import DenseTensor
from pallas_kernels.quantized_matmul import layout
from qwen_jax.errors import CheckpointError
from tests.edited import CASES, GOLDEN, edited, tensors_of


def parameters(checkpoint):
    for path in checkpoint.paths:
        yield path, checkpoint.read_vector(path) if path.endswith(".scale") else checkpoint.read(path)


def arguments(checkpoint):
    raw = json.loads((checkpoint.folder / "config.json").read_text())
    return {"config": raw, "quantization": checkpoint.quantization and checkpoint.quantization.raw}


def written(folder: Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return tensors_of(folder)
    from safetensors.numpy import load_file

    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {name: load_file(folder / name) for name in set(weight_map.values())}
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def assert_same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["quantized", "source"])
def test_round_trip_is_byte_identical(case, kind, tmp_path):
    checkpoint = Checkpoint(GOLDEN / case / kind)
    write(tmp_path / "again", parameters(checkpoint), **arguments(checkpoint), source=checkpoint.folder)
    assert_same(tensors_of(tmp_path / "again"), tensors_of(GOLDEN / case / kind))
    again = Checkpoint(tmp_path / "again")
    assert again.config == checkpoint.config and again.quantization == checkpoint.quantization
    small = {file.name for file in checkpoint.folder.iterdir() if file.suffix == ".json"}
    assert small <= {file.name for file in (tmp_path / "again").iterdir()}


def test_shards_and_their_index(tmp_path):
    checkpoint = Checkpoint(GOLDEN / CASES[0] / "quantized")
    write(tmp_path / "again", parameters(checkpoint), **arguments(checkpoint), max_shard_bytes=200_000)
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 2
    tensors = written(tmp_path / "again")
    assert_same(tensors, tensors_of(GOLDEN / CASES[0] / "quantized"))
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    Checkpoint(tmp_path / "again")


def test_views_in_any_memory_order_are_written_by_their_values(tmp_path):
    # safetensors itself writes a transposed array's memory under its logical shape.
    checkpoint = Checkpoint(GOLDEN / "qwen2-int4-g64-actorder-asym/quantized")

    def views():
        for path, parameter in parameters(checkpoint):
            if isinstance(parameter, np.ndarray):
                yield path, np.repeat(parameter, 2)[::2]
                continue
            weight = parameter.weight
            if isinstance(weight, DenseTensor):
                plain = np.asfortranarray(weight.data).T
                yield path, Module(DenseTensor(plain, weight.dtype, weight.in_features, "plain"), parameter.bias)
            else:
                packed, scales = np.asfortranarray(weight.packed), np.asfortranarray(weight.scales)
                parts = (packed, scales, np.asfortranarray(weight.zeros), weight.permutation)
                yield (
                    path,
                    Module(type(weight)(*parts, weight.bits, weight.group_size, weight.in_features), parameter.bias),
                )

    write(tmp_path / "again", views(), **arguments(checkpoint))
    assert_same(tensors_of(tmp_path / "again"), tensors_of(checkpoint.folder))


def test_zero_biases_come_back_where_the_format_or_the_family_has_them(tmp_path):
    # Llama's weights in Qwen2's names have zero biases: none in memory, zeros in the file again.
    def zero(tensors):
        for name in tensors:
            if name.endswith("q_proj.bias"):
                tensors[name][:] = 0

    checkpoint = Checkpoint(edited("qwen2-int4-per-channel", tmp_path, "source", tensors=zero))
    assert checkpoint.read("layers.0.attention.query").bias is None
    write(tmp_path / "again", parameters(checkpoint), **arguments(checkpoint))
    assert_same(tensors_of(tmp_path / "again"), tensors_of(checkpoint.folder))


def test_without_zero_biases(tmp_path):
    checkpoint = Checkpoint(GOLDEN / "qwen1-int4-g32/quantized")
    write(tmp_path / "again", parameters(checkpoint), **arguments(checkpoint), zero_biases=False)
    tensors = tensors_of(tmp_path / "again")
    assert "transformer.h.0.mlp.w1.bias" not in tensors and "transformer.h.0.attn.c_attn.bias" in tensors


def changed(checkpoint, path, parameter):
    for each, value in parameters(checkpoint):
        yield each, parameter if each == path else value


WEIGHT = layout.from_integers(np.zeros((128, 192)), np.ones((1, 192), np.float32), bits=8)
BAD = {
    "missing": (lambda c: [("final_norm.scale", np.ones(128))], "parameters are missing: embedding"),
    "unknown": (lambda c: [("layers.9.mlp.up", None)], "'layers.9.mlp.up' is no parameter"),
    "twice": (lambda c: [("final_norm.scale", np.ones(128))] * 2, "or was given twice"),
    "shape": (lambda c: [("final_norm.scale", np.ones(127))], r"final_norm.scale: shape \[127\], expected \[128\]"),
    "matrix": (lambda c: changed(c, "layers.0.mlp.down", Module(WEIGHT)), r"layers.0.mlp.down: is .*\[128, 192\]"),
    "bits": (lambda c: changed(c, "layers.0.mlp.up", Module(WEIGHT)), "has 8 bits and group_size 128, but by quant"),
    "float": (
        lambda c: changed(c, "layers.0.mlp.up", Module(DenseTensor(np.zeros((192, 128)), "float32", 128))),
        "layers.0.mlp.up: is a float matrix, but by",
    ),
    "head": (
        lambda c: changed(c, "lm_head", Module(layout.from_integers(np.zeros((128, 384)), np.ones((1, 384)), bits=4))),
        "lm_head: has 4 bits, but by the settings it is a float module",
    ),
    "layout": (
        lambda c: changed(
            c, "lm_head", Module(DenseTensor(np.zeros((64, 384), np.int32), "float16", 128, "row_pairs"))
        ),
        "layout is 'row_pairs', expected 'transposed' or 'plain'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_failed_write_leaves_nothing(tmp_path, name):
    make, message = BAD[name]
    checkpoint = Checkpoint(GOLDEN / "qwen2-int4-per-channel/quantized")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "again", make(checkpoint), **arguments(checkpoint))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_kept_unless_told_otherwise(tmp_path):
    checkpoint = Checkpoint(GOLDEN / CASES[0] / "source")
    (tmp_path / "again").mkdir()
    (tmp_path / "again/mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="again: is there already"):
        write(tmp_path / "again", parameters(checkpoint), **arguments(checkpoint))
    assert (tmp_path / "again/mine.txt").exists()
    write(tmp_path / "again", parameters(checkpoint), **arguments(checkpoint), overwrite=True)
    assert not (tmp_path / "again/mine.txt").exists() and [file.name for file in tmp_path.iterdir()] == ["again"]

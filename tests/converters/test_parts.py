"""Parts of a module read by their bytes alone, against the whole module cut."""

from pathlib import Path

import numpy as np
import pytest

from converters.huggingface import Checkpoint
from converters.safetensors_files import StoredTensor, at_runs
from pallas_kernels.dense_matmul import DenseTensor
from pallas_kernels.quantized_matmul import layout
from qwen_jax.checkpoint_store import convert
from qwen_jax.converted_modules import ConvertedModules
from tests.qwen_jax.test_golden import GOLDEN

FOLDERS = sorted(folder for case in GOLDEN.iterdir() for folder in case.glob("*") if (folder / "config.json").exists())


def values(module):
    """[in, out] float64 of a module, in the order of its stored rows."""
    weight = module.weight
    if isinstance(weight, DenseTensor):
        return np.asarray(weight.data, np.float64).T
    q_IO = layout.unpack(np.asarray(weight.packed), weight.bits, weight.in_features).astype(np.float64)
    group_I = np.arange(weight.in_features) // weight.group_size
    zeros = np.float64(2 ** (weight.bits - 1)) if weight.zeros is None else np.asarray(weight.zeros)[group_I]
    return (q_IO - zeros) * np.asarray(weight.scales, np.float64)[group_I]


def check_parts(checkpoint, path):
    item, whole = checkpoint.spec(path), values(checkpoint.read(path))
    O = item.out_features  # noqa: E741
    columns = (slice(1, O // 4), slice(O // 2, O - 1))
    np.testing.assert_array_equal(values(checkpoint.read(path, columns=columns)), at_runs(whole, columns, 1))
    unit = 1 if item.group_size is None else int(np.lcm(item.group_size, 32))
    if item.has_permutation or item.in_features <= unit:
        return
    rows = (slice(unit, item.in_features),)
    np.testing.assert_array_equal(values(checkpoint.read(path, rows=rows)), at_runs(whole, rows, 0))
    both = checkpoint.read(path, rows=rows, columns=columns)
    np.testing.assert_array_equal(values(both), at_runs(at_runs(whole, rows, 0), columns, 1))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_parts_of_every_golden_module(folder: Path):
    checkpoint = Checkpoint(folder)
    for path in checkpoint._modules:
        if not path.startswith("layers.") or path.startswith("layers.0."):
            check_parts(checkpoint, path)


def test_parts_of_a_converted_folder(tmp_path):
    convert(GOLDEN / "qwen2-int4-g64-actorder-asym" / "quantized", tmp_path / "converted")
    checkpoint = ConvertedModules(tmp_path / "converted")
    for module in ("attention.query", "attention.value", "attention.output", "mlp.up", "mlp.down"):
        check_parts(checkpoint, f"layers.1.{module}")
    check_parts(checkpoint, "embedding")


def test_only_bytes_of_the_part_are_read(tmp_path, monkeypatch):
    array = np.arange(64 * 48, dtype=np.int32).reshape(64, 48)
    array.tofile(tmp_path / "file")
    tensor = StoredTensor("x", tmp_path / "file", "I32", array.shape, 0)
    box = ((slice(3, 5), slice(60, 64)), (slice(0, 2), slice(40, 48)))
    np.testing.assert_array_equal(tensor.read_box(*box), at_runs(at_runs(array, box[0], 0), box[1], 1))
    np.testing.assert_array_equal(tensor.read_box(box[0], None), at_runs(array, box[0], 0))
    # Other bytes are not there to be read: a file that ends after the last wanted one.
    with (tmp_path / "file").open("r+b") as stream:
        stream.truncate((4 * 48 + 2) * 4)
    np.testing.assert_array_equal(tensor.read_box((slice(3, 5),), (slice(0, 2),)), array[3:5, :2])

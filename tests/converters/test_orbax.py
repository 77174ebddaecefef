"""Our own checkpoint: every dtype and memory order back to the bit, sharded, complete or refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters import orbax
from qwen_jax.errors import CheckpointError
from tests.edited import GOLDEN

SOURCE = GOLDEN / "qwen3-gptqmodel-int4-g32-dynamic-tied/quantized"


def state():
    random = np.random.default_rng(0)
    packed = random.integers(-(2**31), 2**31, (3, 16, 24), dtype=np.int32)
    return {
        "layers.0.mlp.up.packed": packed.transpose(0, 2, 1),  # a view: Orbax must see its values, not its memory
        "layers.0.mlp.up.scales": np.asfortranarray(random.normal(size=(3, 2, 16)).astype(np.float16)),
        "layers.0.mlp.up.zeros": random.integers(0, 16, (3, 2, 16), dtype=np.uint8)[:, ::-1],
        "embedding": random.normal(size=(32, 8)).astype(ml_dtypes.bfloat16),
        "head": jnp.asarray(random.normal(size=(8, 32)), jnp.float32),
        "nibbles": jnp.arange(-8, 8, dtype=jnp.int4),
        "scalar": np.asarray(16777217, np.int32),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "checkpoint"
    orbax.save(folder, state(), {"blocks": [[0, 3]], "bits": 4}, source=SOURCE)
    return folder


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert np.asarray(found[name]).tobytes() == np.ascontiguousarray(array).tobytes(), name


def test_every_bit_comes_back(saved):
    found, metadata = orbax.restore(saved)
    assert_same(found, state())
    assert metadata == {"blocks": [[0, 3]], "bits": 4}


def test_the_folder_stands_alone(saved):
    for name in ("config.json", "quantize_config.json", "generation_config.json", "tokenizer.json"):
        assert (saved / name).read_bytes() == (SOURCE / name).read_bytes()
    assert orbax.is_checkpoint(saved) and not orbax.is_checkpoint(SOURCE)
    assert [file.name for file in saved.parent.iterdir()] == ["checkpoint"]


def test_describe_reads_no_array(saved):
    shapes, metadata = orbax.describe(saved)
    assert {name: (a.shape, a.dtype) for name, a in shapes.items()} == {
        name: (a.shape, a.dtype) for name, a in state().items()
    }
    assert metadata["bits"] == 4


def test_restored_in_parts_onto_devices(saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))
    columns = jax.sharding.NamedSharding(mesh, jax.P(None, None, "model"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    names = state()
    shardings = dict.fromkeys(names, everywhere) | dict.fromkeys(["layers.0.mlp.up.packed"], columns)
    found, _ = orbax.restore(saved, shardings=shardings)
    assert_same(found, names)
    packed = found["layers.0.mlp.up.packed"]
    assert packed.sharding == columns and packed.addressable_shards[0].data.shape == (3, 24, 4)
    abstract = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[n]) for n, a in names.items()}
    assert orbax.restore(saved, abstract=abstract)[0]["layers.0.mlp.up.packed"].sharding == columns


def test_restored_under_watch(saved, monkeypatch):
    """In parts of two arrays or so, with the bytes of each; the same arrays in the end."""
    said, total = [], sum(np.asarray(array).nbytes for array in state().values())
    monkeypatch.setattr(orbax, "PART_BYTES", 300)
    found, metadata = orbax.restore(saved, progress=lambda *numbers: said.append(numbers))
    assert_same(found, state())
    assert metadata["bits"] == 4
    assert len(said) > 3 and said == sorted(set(said)) and said[-1] == (total, total)
    whole = []
    monkeypatch.setattr(orbax, "PART_BYTES", 1 << 20)
    assert_same(orbax.restore(saved, progress=lambda *numbers: whole.append(numbers))[0], state())
    assert whole == [(total, total)]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scalar", {"dtype": jnp.float32}, r"scalar: int32 \[\], expected float32 \[\]; nothing is cast"),
        ("nibbles", {"dtype": jnp.int8}, r"nibbles: int4 \[16\], expected int8"),
        ("embedding", {"shape": (8, 32)}, r"embedding: bfloat16 \[32, 8\], expected bfloat16 \[8, 32\]"),
    ],
)
def test_what_differs_from_the_expectation_is_an_error(saved, name, change, message):
    abstract = {each: jax.ShapeDtypeStruct(array.shape, array.dtype) for each, array in state().items()}
    old = abstract[name]
    abstract[name] = jax.ShapeDtypeStruct(change.get("shape", old.shape), change.get("dtype", old.dtype))
    with pytest.raises(CheckpointError, match=message):
        orbax.restore(saved, abstract=abstract)


def test_missing_and_unexpected_arrays(saved):
    abstract = {each: jax.ShapeDtypeStruct(array.shape, array.dtype) for each, array in state().items()}
    abstract["other"] = abstract.pop("head")
    with pytest.raises(CheckpointError, match=r"lacks arrays \['other'\] and has unexpected ones \['head'\]"):
        orbax.restore(saved, abstract=abstract)


def test_half_written_and_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    orbax.save(folder, {"a": np.arange(1000)[:5].astype(np.int32), "b": np.ones(3, np.float32)}, {})
    chunk = folder / "arrays/a/c/0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"a/c/0: has {len(content) - 1} bytes, expected {len(content)}"):
        orbax.restore(folder)
    chunk.unlink()  # Zarr itself would read a missing chunk as zeros
    with pytest.raises(CheckpointError, match="a/c/0: has 0 bytes"):
        orbax.restore(folder)
    (folder / orbax.MANIFEST).unlink()
    assert orbax.is_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"has no qwen_jax.json; the checkpoint was not written to its end"):
        orbax.restore(folder)


def test_a_later_version_is_refused(tmp_path):
    orbax.save(tmp_path / "c", {"a": np.ones(3, np.float32)}, {})
    manifest = json.loads((tmp_path / "c/qwen_jax.json").read_text())
    (tmp_path / "c/qwen_jax.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2, expected 'qwen-jax' version 1"):
        orbax.restore(tmp_path / "c")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [({}, "state is empty"), ({"a": np.ones(3)}, "a: dtype float64"), ({"a": np.ones(3, np.int64)}, "a: dtype int64")],
)
def test_what_is_not_saved(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        orbax.save(tmp_path / "c", arrays, {})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_there_is_kept(saved):
    with pytest.raises(CheckpointError, match="is there already"):
        orbax.save(saved, {"a": np.ones(3, np.float32)}, {})
    assert_same(orbax.restore(saved)[0], state())


def test_saved_from_one_mesh_and_restored_on_another(tmp_path):
    def on_mesh(data, model, *axes):
        devices = np.array(jax.devices()[: data * model]).reshape(data, model)
        return jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("data", "model")), jax.P(*axes))

    weight = np.arange(24 * 16, dtype=np.int32).reshape(24, 16)
    orbax.save(tmp_path / "saved", {"w": jax.device_put(weight, on_mesh(2, 4, None, "model"))}, {})
    for sharding, share in ((on_mesh(1, 2, "model"), (12, 16)), (on_mesh(8, 1, None, "data"), (24, 2))):
        found = orbax.restore(tmp_path / "saved", shardings=sharding)[0]["w"]
        assert found.sharding == sharding and found.addressable_shards[0].data.shape == share
        np.testing.assert_array_equal(found, weight)

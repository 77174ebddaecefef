"""What a host reads of a checkpoint: its devices' share, by counting bytes; and pieces are those of the whole."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from converters import gptq, safetensors_files
from converters.huggingface import Checkpoint
from converters.safetensors_files import at_runs, length
from pallas_kernels.quantized_matmul import QuantizedTensor, layout
from qwen_jax.checkpoint_store import convert
from qwen_jax.converted_modules import ConvertedModules
from qwen_jax.sharded_weights import ShardedWeights
from qwen_jax.sharding import parse_mesh, split_vocabulary
from qwen_jax.weight_cuts import take_columns, take_rows
from tests.qwen_jax.test_golden import GOLDEN
from tests.qwen_jax.test_sharding import ACT_ORDER, QWEN1

MODULES = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}


def pieces(weights: ShardedWeights, number: int):
    """(path, piece for place `number` of each matrix of the first layer, of the embedding), read for it alone."""
    weights.placement.numbers = [number]
    for path in MODULES:
        columns = weights._columns(path, 0)
        for names, stored in weights.matrices(0, path):
            by_module = [names] if len(stored) == 1 else [(name,) for name in names]
            for name, inside in zip(stored, by_module, strict=True):
                wanted = np.concatenate([columns[output] for output in inside], axis=1)
                module, cut = weights._read(f"layers.0.{path}.{name}", columns_NO=wanted)
                yield f"layers.0.{path}.{name}", take_columns(module.weight, cut[number])
    for path in ("attention.output", "mlp.down"):
        wanted, group_size = weights._rows(path, 0)
        module, cut = weights._read(f"layers.0.{path}", rows_NI=wanted)
        weight = module.weight
        if isinstance(weight, QuantizedTensor):
            weight = dataclasses.replace(weight, permutation=None)
        yield f"layers.0.{path}", take_rows(weight, cut[number], group_size)


CASES = [(QWEN1, "quantized"), (QWEN1, "source"), ("qwen2-int4-per-channel", "quantized"), (ACT_ORDER, "quantized")]
CASES += [("qwen3-gptqmodel-int4-g32-dynamic-tied", "quantized")]
CASES += [("qwen3-gptqmodel-int4-g64-v2-asym-actorder", "quantized")]


@pytest.mark.parametrize("case, kind", CASES)
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("devices", [3, 8])
def test_parts_are_those_of_the_whole(tmp_path, case, kind, converted, devices):
    folder = GOLDEN / case / kind
    if converted:
        convert(folder, tmp_path / "converted")
    source = ConvertedModules(tmp_path / "converted") if converted else Checkpoint(folder)
    mesh = parse_mesh(f"1x{devices}")
    whole = ShardedWeights(source, mesh, dtype="float32")
    parts = ShardedWeights(source, mesh, dtype="float32")
    whole._read = lambda path, *, rows_NI=None, columns_NO=None: (  # the path that reads everything
        source.read(path),
        rows_NI if columns_NO is None else columns_NO,
    )
    for number in range(devices):
        for (path, got), (_, want) in zip(pieces(parts, number), pieces(whole, number), strict=True):
            for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{path} of {number}", strict=True)


SMALL = ("qzeros", "g_idx", "bias")  # read whole: in groups of 128 a hundredth of the weights


def bytes_read(monkeypatch):
    """A list to which each read from now on appends its bytes."""
    counts = []
    for name in ("read", "read_box"):
        read = getattr(safetensors_files.StoredTensor, name)

        def counted(self, *arguments, read=read):
            before = len(counts)
            array = read(self, *arguments)
            del counts[before:]  # of a read inside this one
            if not self.name.endswith(SMALL):
                counts.append(array.nbytes)
            return array

        monkeypatch.setattr(safetensors_files.StoredTensor, name, counted)
    return counts


@pytest.mark.parametrize("kind", ["quantized", "source"])
def test_a_host_reads_its_share(monkeypatch, kind):
    """Four hosts of one device each; rows of 32 and whole groups make the first three's share a bit more."""
    source = Checkpoint(GOLDEN / QWEN1 / kind)
    weights = ShardedWeights(source, parse_mesh("1x4"), dtype="float32")
    paths = [path for path, _ in pieces(weights, 0)]
    counts = bytes_read(monkeypatch)
    for path in paths:
        source.read(path)
    whole, largest = sum(counts), max(counts)
    total = []
    for number in range(4):
        counts.clear()
        list(pieces(weights, number))
        total.append(sum(counts))
        assert max(counts) < largest / 3
    assert sum(total) < 1.05 * whole  # a group that two of them share is read twice
    assert max(total) < 0.3 * whole
    counts.clear()
    weights.placement.numbers = [1]
    weights._read("embedding", columns_NO=split_vocabulary(weights.config.vocab_size, 4))
    assert max(counts) <= source.nbytes("embedding") / 4


def test_reads_are_counted_by_the_system(tmp_path):
    """The same told by the kernel: of a matrix of 8 MB a quarter of the columns is read as 2 MB."""
    from safetensors.numpy import save_file

    data = np.arange(2048 * 1024, dtype=np.int32).reshape(2048, 1024)
    save_file({"x": data}, tmp_path / "x.safetensors")
    tensor = safetensors_files.header(tmp_path / "x.safetensors")["x"]

    def characters():
        with open("/proc/self/io") as stream:
            return int(stream.readline().split()[1])

    if not os.path.exists("/proc/self/io"):
        pytest.skip("the system does not count")
    before = characters()
    got = tensor.read_box((slice(0, 1024), slice(1536, 2048)), (slice(256, 512),))
    assert characters() - before < got.nbytes * 1.02
    np.testing.assert_array_equal(got, data[np.r_[0:1024, 1536:2048], 256:512])


def test_what_is_read_whole(monkeypatch):
    """The bound for what does not come in byte ranges: zero-points take 1 / group of the words they belong to, group
    indices and biases 4 bytes a row or column; of act-order split by rows a host reads what else is in its words."""
    source = Checkpoint(GOLDEN / ACT_ORDER / "quantized")
    weights = ShardedWeights(source, parse_mesh("1x4"), dtype="float32")
    rows = ("layers.0.attention.output", "layers.0.mlp.down")
    paths = [path for path, _ in pieces(weights, 0)]
    for path in paths:
        stored, spec = source._stored[path], source.spec(path)
        assert stored["qzeros"].nbytes * spec.group_size <= stored["qweight"].nbytes
        others = sum(stored[name].nbytes for name in ("g_idx", "bias") if name in stored)
        assert others <= 4 * (spec.in_features + spec.out_features)
    counts = bytes_read(monkeypatch)
    for number in range(4):
        read = {}
        for path, _ in pieces(weights, number):
            read[path] = sum(counts)
            counts.clear()
        for path, found in read.items():  # of two key/value heads each of four devices has one
            whole = source._stored[path]["qweight"].nbytes + source._stored[path]["scales"].nbytes
            assert found <= (1 if path in rows else 0.5) * whole, path


@pytest.mark.parametrize("bits, unit", [(4, 8), (3, 32), (8, 4), (2, 16)])
def test_words_of_scattered_rows(bits, unit):
    """16 hosts, act-order at random: each reads the words in which a row is its own, 1 − (1 − 1/16)^unit of them."""
    rng = np.random.default_rng(bits)
    q, permutation = rng.integers(0, 2**bits, (4096, 3)), rng.permutation(4096).astype(np.int32)
    packed, rows = layout.pack(q, bits), (slice(256, 384), slice(1024, 1152))
    runs = gptq.scattered(permutation, rows, bits)
    assert abs(length(runs) / 4096 - (1 - (1 - 1 / 16) ** unit)) < 0.05
    part = at_runs(packed, gptq.divided(runs, 32, bits), 0)
    found = gptq.reorder(part, permutation, bits, 4096, rows)
    want = q[permutation[np.r_[256:384, 1024:1152]]]
    np.testing.assert_array_equal(layout.unpack(found, bits, 256), want)

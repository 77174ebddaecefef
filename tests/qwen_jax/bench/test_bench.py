"""`qwen-jax bench matmul`, `attention`, `memory` at tiny sizes: bytes and floors by arithmetic, results that agree."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import pytest

from pallas_kernels.chip import compiling_for
from qwen_jax import cli
from qwen_jax.bench import attention, decode, floors, matmul, memory, processes
from qwen_jax.bench.models import MODELS
from qwen_jax.commands import bench_output
from tests.qwen_jax.bench.test_mesh import SMALL

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def a_copy_of_100_gigabytes_a_second(monkeypatch):
    monkeypatch.setattr(matmul.timing, "copy_bandwidth", lambda *_: 100e9)


def check_speed(record, size, copy=100.0):
    floor = size / copy / 1e3
    assert record["bytes"] == size and record["error"] < 4e-3
    assert record["floor_us"] == pytest.approx(floor, abs=0.01)
    assert record["gigabytes_per_second"] == pytest.approx(size / record["us"] / 1e3)
    assert record["of_copy"] == pytest.approx(floor / record["us"], rel=1e-3)


def test_matmul():
    copy, records = matmul.measure([(128, 96)], rows=[2], bits=[4, 16], group_size=32, rotate_bytes=1e4)
    packed, dense = records
    assert copy == 100 and packed["kernel"].startswith("xla (packed words")
    check_speed(packed, 128 * 96 // 2 + 4 * 96 * 2)
    check_speed(dense, 128 * 96 * 2)
    assert "group_size" not in dense and packed["rows"] == 2


def test_a_wrong_product_shows(monkeypatch):
    right = matmul._reference
    monkeypatch.setattr(matmul, "_reference", lambda *operands: 1.1 * right(*operands))
    [record] = matmul.measure([(128, 96)], rows=[2], rotate_bytes=1e4)[1]
    assert record["error"] == pytest.approx(0.1 / 1.1, rel=0.02)


def test_attention(monkeypatch):
    dims = attention.parse_shape("4x2x64")._replace(key_bias=True)
    _, records = attention.measure([("tiny", dims)], batch=[2], context=[64], rotate_bytes=1e4)
    for record, token in zip(records, (2 * 64 + 8, 4 * 64), strict=True):
        check_speed(record, 2 * 64 * 2 * token)
    right = attention.reference.attend_decode
    wrong = lambda *operands, key_bias_GK, **options: right(*operands, key_bias_GK=0 * key_bias_GK, **options)  # noqa: E731
    monkeypatch.setattr(attention.reference, "attend_decode", wrong)
    [record] = attention.measure([("tiny", dims)], batch=[2], context=[64], kv_bits=[8], rotate_bytes=1e4)[1]
    assert record["error"] > 0.04


@pytest.mark.parametrize("bits, kernels, rows", [(4, "auto", 1), (8, "auto", 64), (4, "xla", 1), (16, "auto", 1)])
def test_chains_of_a_hopper_gpu(bits, kernels, rows):
    """What is timed: kernels of ours in a chain, XLA's dots each on a weight of its own and none dropped."""
    job = {"in": 256, "out": 128, "bits": bits, "group_size": 128, "dtype": "bfloat16", "kernels": kernels}
    with compiling_for(H100):
        make = functools.partial(matmul._random_weight, job, H100)
        [(multiply, named)] = matmul._forms(job, rows, [], H100)
        chain, calls = matmul._chain(job | {"rows": rows} | named, multiply, 5)
        x_MI, weights = jax.ShapeDtypeStruct((rows, 256), "bfloat16"), [matmul._abstract(make)] * 5
        traced = chain.trace(x_MI, weights)
    own = kernels == "auto" and bits < 16
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("custom_call @mosaic_gpu" in text) == own and ("tiling" in named) == own
    assert calls == (241 if own else 5) and len(jax.tree.leaves(traced.out_info)) == (2 if own else 5)


def test_memory(monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "small", SMALL)
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "memory", "--model", "small", "--dtype", "float32", "--context", "128", "--json"])
    assert not exit.value.code
    facts = json.loads(capsys.readouterr().out)
    [record] = facts["results"]
    layer = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 640
    weights = 2 * layer * (1 / 2 + 4 / 128) + 2 * 320 * 256 * 4 + 5 * 256 * 4 + 2 * 512 * 4 + 2 * 128 * 4
    assert record["weight_bytes"] == weights
    assert record["cache_bytes"] == pytest.approx(2 * 128 * 2 * 2 * (64 + 4), abs=64)  # and lengths
    assert record["peak_bytes"] - weights - record["cache_bytes"] == record["rest_bytes"] > 4 * 96 * 1280
    assert record["how"] == memory.COMPILED and facts["kind"] == "memory" and facts["environment"]["command"]


def test_memory_of_a_device_that_counts(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    job = dict(model="small", bits=4, kv_bits=8, batch=1, context=96, layers=1, dtype="float32", kernels="auto")
    monkeypatch.setattr(memory.Programs, "stream", lambda *_: iter(()))
    peaks = iter([{"peak_bytes_in_use": 10**9}, {"peak_bytes_in_use": 3 * 10**9}])
    record = memory.counted(job | {"one_launch": False}, lambda: next(peaks))
    assert (record["how"], record["peak_bytes"], record["peak_bytes_of_making"]) == ("measured", 3 * 10**9, 10**9)
    assert record["layers"] == 1


def test_workers(tmp_path, monkeypatch):
    """A worker that dies is told for the jobs that it left, and the other's records stay."""
    (tmp_path / "worker.py").write_text(
        "import json, sys\n"
        "for job in json.loads(sys.argv[1])['jobs']:\n"
        "    if job['in'] == 2: sys.exit(9)\n"
        "    print(json.dumps({'in': job['in'], 'us': 1.0}))\n"
    )
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.setattr(processes.jax, "default_backend", lambda: "gpu")
    records = processes.run("worker", lambda *_: iter(()), [{"in": 1, "rows": [1]}, {"in": 2, "rows": [1]}])
    assert sorted(records, key=lambda record: record["in"]) == [
        {"in": 1, "us": 1.0},
        {"in": 2, "failed": "its process ended with 9"},
    ]


def test_floors():
    step = {"gigabytes_per_second": 1500.0, "bytes_per_step": 3 * 10**9}
    floors.add("decode", step, 3000.0)
    assert step["of_copy"] == 0.5 and step["floor_ms"] == 1.0
    prefill = {"milliseconds": 40.0, "model": "qwen-7b", "layers": 32, "batch": 1, "context": 2048, "mesh": "1x2"}
    floors.add("prefill", prefill, 3000.0, H100)
    weights = 32 * (4096 * 4 * 4096 + 3 * 4096 * 11008)
    attention_operations = 32 * 2 * 2048 * 2048 * 4096
    assert prefill["floor_ms"] == pytest.approx(
        (2 * 2048 * weights + attention_operations) / 2 / 989e12 * 1e3, rel=0.02
    )
    failed = {"failed": "out of memory"}
    floors.add("decode", failed, 3000.0)
    assert failed == {"failed": "out of memory"}


def test_a_head_of_8_bits(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    monkeypatch.setitem(MODELS, "tied", dataclasses.replace(SMALL, tie_word_embeddings=True))

    def size(name, **options):
        decoder = jax.eval_shape(lambda: decode.build(name, bits=4, dtype="bfloat16", **options))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(decoder))

    assert size("small") - size("small", lm_head="int8") == 320 * 256 * 2 - 320 * 256 - 320 * (256 // 64) * 2
    with pytest.raises(ValueError, match="head is its embedding"):
        size("tied", lm_head="int8")
    with pytest.raises(ValueError, match="on a mesh have a 16-bit head"):
        size("small", lm_head="int8", as_on_mesh=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["memory", "--lm-head", "int4"], "--lm-head int4 is none of None, int8"),
        (["matmul", "--shape", "4096"], "expected in x out"),
        (["matmul", "--kernels", "fast"], "--kernels fast is none of auto"),
        (["attention", "--shape", "5x2x64"], "expected query heads"),
        (["memory", "--bits", "5"], "--bits 5 is none of"),
        (["decode", "--dtype", "int8"], "--dtype int8 is none of"),
    ],
)
def test_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("capability, dtype", [("7.5", "float16"), ("8.0", "bfloat16")])
def test_the_dtype_of_an_older_gpu(capability, dtype, monkeypatch):
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert (bench_output.resolve("auto"), bench_output.resolve("float32")) == (dtype, "float32")


def test_shapes_of_a_model():
    assert matmul.model_shapes("qwen2.5-7b") == ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584))
    assert attention.dims_of("qwen3-8b")[:4] == (32, 8, 128, False) and attention.dims_of("qwen-7b").key_bias
    assert attention.dims_of("qwen-72b").layers == 80

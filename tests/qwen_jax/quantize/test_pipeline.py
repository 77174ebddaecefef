"""From float folders of all families to GPTQ folders: what was calibrated is what the written model computes."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.huggingface import Checkpoint
from pallas_kernels.quantized_matmul import layout
from pallas_kernels.quantized_matmul.reference import dequantize
from qwen_jax import QwenForCausalLM
from qwen_jax.errors import CheckpointError
from qwen_jax.quantize import QuantizeSettings, quantize
from qwen_jax.quantize import pipeline as pipeline_module
from qwen_jax.quantize import streams as streams_module
from qwen_jax.quantize.activations import ActivationStore
from qwen_jax.quantize.gptq import quantize_matrix
from qwen_jax.quantize.layer import Layer
from qwen_jax.quantize.round_to_nearest import round_to_nearest
from qwen_jax.quantize.streams import Streams, batches

GOLDEN = Path(__file__).parents[2] / "golden"
V1, QWEN2, QWEN3, TIED = (
    "qwen1-int4-g32",
    "qwen2-int4-g64-actorder-asym",
    "qwen3-gptqmodel-int4-g64-v2-asym-actorder",
    "qwen3-gptqmodel-int4-g32-dynamic-tied",
)
SMALL = QuantizeSettings(group_size=32)
rng = np.random.default_rng(0)
ROWS = [rng.integers(0, 350, length) for length in (48, 48, 40, 33, 48, 24)]


def source(case):
    return GOLDEN / case / "source"


def run(case, target, settings=SMALL, rows=ROWS, **options):
    return quantize(source(case), target, rows, settings, dtype="float32", **options)


def same(one: Path, other: Path) -> bool:
    names = sorted(file.name for file in one.iterdir())
    return names == sorted(file.name for file in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def final_streams(case, tmp_path, settings):
    """Both residual streams behind the last layer, row by row, from the pipeline itself."""
    store = ActivationStore(1 << 30, tmp_path)
    checkpoint = Checkpoint(source(case))
    streams = Streams(
        checkpoint, ROWS, settings, dtype="float32", store=store, devices=jax.devices()[:1], report=lambda report: None
    )
    streams.start()
    for layer in range(checkpoint.config.num_layers):
        streams.quantize_layer(layer)
    rows = {"hidden": [], "float_hidden": []}
    for b, batch in enumerate(streams.batches):
        for name, found in rows.items():
            found += [row[:length] for row, length in zip(store.get(name, b), batch.lengths_B, strict=True)]
    return rows, sorted(ROWS, key=len, reverse=True)


@pytest.mark.parametrize("case", [V1, pytest.param(QWEN2, marks=pytest.mark.slow), QWEN3])
def test_both_streams_are_the_models_own(case, tmp_path):
    """The float stream is the float model's, the quantized one that of the checkpoint as it was written."""
    run(case, tmp_path / "out")
    rows, ids = final_streams(case, tmp_path, SMALL)
    for name, folder in (("float_hidden", source(case)), ("hidden", tmp_path / "out")):
        model = QwenForCausalLM.from_pretrained(folder, dtype="float32")
        for stream_TD, row in zip(rows[name][:2], ids[:2], strict=True):
            logits_TV = np.asarray(model.decoder.logits(model.decoder.final_norm(stream_TD)))
            want_TV = np.asarray(model(row[None])[0])
            assert np.linalg.norm(logits_TV - want_TV) < 1e-3 * np.linalg.norm(want_TV)
    apart = np.linalg.norm(rows["hidden"][0] - rows["float_hidden"][0]) / np.linalg.norm(rows["hidden"][0])
    assert 0.005 < apart < 0.3


@pytest.mark.parametrize(
    "change",
    [
        {"sym": False, "desc_act": True},
        {"sym": False, "format": "gptq_v2", "group_size": -1, "bits": 3},
        {"desc_act": True, "static_groups": True, "bits": 8},
        {"format": "compressed-tensors", "desc_act": True, "static_groups": True},
        {"lm_head": True, "dynamic": {"-:.*down_proj": {}, r"+:.*\.0\..*q_proj": {"bits": 8, "group_size": 64}}},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_settings_reach_the_file(change, tmp_path):
    settings = dataclasses.replace(SMALL, **change)
    reports = run(QWEN2, tmp_path / "out", settings)
    checkpoint = Checkpoint(tmp_path / "out")  # checks names, shapes and settings against each other
    spec = checkpoint.spec("layers.1.attention.key")
    assert (spec.bits, spec.group_size) == (settings.bits, 128 if settings.group_size == -1 else settings.group_size)
    assert spec.has_zeros == (not settings.sym)
    assert spec.has_permutation == (settings.desc_act and not settings.static_groups)
    assert spec.zero_convention == ("v1" if settings.format == "gptq" else "v2")
    first = checkpoint.spec("layers.0.attention.query")
    assert (first.bits, first.group_size) == ((8, 64) if settings.dynamic else (spec.bits, spec.group_size))
    assert checkpoint.spec("layers.0.mlp.down").kind == ("dense" if settings.dynamic else "quantized")
    assert checkpoint.spec("lm_head").kind == ("quantized" if settings.lm_head else "dense")
    assert len(reports) == (3 * 6 + 1 if settings.dynamic else 3 * 7)
    assert all(0 < report.error < 0.05 for report in reports)


def test_the_file_is_what_autogptq_writes(tmp_path):
    """Names, shapes and dtypes of every tensor, and the settings' keys, as in a folder that AutoGPTQ 0.7.1 wrote."""
    run(V1, tmp_path / "out")
    ours, theirs = ({}, {})
    for folder, found in ((tmp_path / "out", ours), (GOLDEN / V1 / "quantized", theirs)):
        for file in folder.glob("*.safetensors"):
            found |= {name: (array.shape, array.dtype) for name, array in load_file(file).items()}
    assert {name: shape for name, (shape, _) in ours.items()} == {name: shape for name, (shape, _) in theirs.items()}
    integers = [name for name in ours if name.endswith(("qweight", "qzeros", "g_idx"))]
    assert len(integers) == 45 and all(ours[name] == theirs[name] for name in integers)
    # That folder was made from a model held in float32 and so has float32 scales; ours are always float16.
    assert {dtype for name, (_, dtype) in ours.items() if name.endswith("scales")} == {np.dtype(np.float16)}
    written = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    wanted = json.loads((GOLDEN / V1 / "quantized" / "quantize_config.json").read_text()).keys()
    assert written.keys() >= wanted - {"is_marlin_format"}  # GPTQModel 7.7 refuses a folder that has it
    assert "is_marlin_format" not in written


def rounded(case, path):
    weight_IO = Checkpoint(source(case)).read(path).weight.data.T
    return round_to_nearest(weight_IO, bits=4, group_size=32, symmetric=True)


def error_on(read, inputs):
    """Mean over modules of ‖X(W − Ŵ)‖² / ‖XW‖² for fixed inputs; `read` gives a path's QuantizedTensor."""
    exact = Checkpoint(source(V1))
    errors = []
    for path, x_MI in inputs.items():
        weight_IO = exact.read(path).weight.data.astype(np.float64).T
        quantized_IO = dequantize(read(path))
        errors.append(np.linalg.norm(x_MI @ (quantized_IO - weight_IO)) ** 2 / np.linalg.norm(x_MI @ weight_IO) ** 2)
    return np.mean(errors)


def float_inputs(case, rows):
    """Inputs of every projection in the float model, for other tokens than the calibration's."""
    checkpoint, inputs = Checkpoint(source(case)), {}
    hidden_BTD = checkpoint.read("embedding").weight.data[np.stack(rows)].astype(np.float32)
    lengths_B = np.full(len(rows), len(rows[0]), np.int32)
    for n in range(checkpoint.config.num_layers):
        layer = Layer.read(checkpoint, n, "float32")
        inputs[f"layers.{n}.attention.qkv"] = layer.attention_input(hidden_BTD)
        inputs[f"layers.{n}.attention.output"] = attended = layer.attended(hidden_BTD, lengths_B)
        hidden_BTD = layer.add("attention.output", hidden_BTD, attended)
        inputs[f"layers.{n}.mlp.gate"] = inputs[f"layers.{n}.mlp.up"] = layer.mlp_input(hidden_BTD)
        inputs[f"layers.{n}.mlp.down"] = activated = layer.activated(hidden_BTD)
        hidden_BTD = layer.add("mlp.down", hidden_BTD, activated)
    return {path: np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for path, x in inputs.items()}


def test_layer_error_against_autogptqs_tensors(tmp_path):
    """On inputs that neither was calibrated on ours is no worse than AutoGPTQ's; rounding to nearest is."""
    generator = np.random.default_rng(3)
    settings = QuantizeSettings(group_size=32, group_aware=False, scale_search=False, propagation=0)  # AutoGPTQ's
    run(V1, tmp_path / "out", settings, [generator.integers(0, 512, 64) for _ in range(32)])
    inputs = float_inputs(V1, [generator.integers(0, 512, 64) for _ in range(16)])
    ours, theirs = (
        error_on(lambda path, folder=folder: Checkpoint(folder).read(path).weight, inputs)
        for folder in (tmp_path / "out", GOLDEN / V1 / "quantized")
    )
    assert ours < 1.02 * theirs
    assert error_on(lambda path: rounded(V1, path), inputs) > 1.1 * theirs


def test_calibration_and_propagation_are_used(tmp_path):
    run(V1, tmp_path / "one")
    run(V1, tmp_path / "other", rows=[(row * 7 + 3) % 350 for row in ROWS])
    run(V1, tmp_path / "alone", dataclasses.replace(SMALL, propagation=0.0))
    words = {
        name: {
            path: np.asarray(Checkpoint(tmp_path / name).read(path).weight.packed)
            for path in ("layers.0.attention.qkv", "layers.2.mlp.down")
        }
        for name in ("one", "other", "alone")
    }
    assert all((words["one"][path] != words["other"][path]).any() for path in words["one"])
    first, last = words["one"]
    assert (words["one"][first] == words["alone"][first]).all()  # nothing is quantized before it
    assert (words["one"][last] != words["alone"][last]).any()


@pytest.mark.parametrize("path", ["attention.output", "mlp.gate"])
def test_moments_are_the_streams_own(path, tmp_path, monkeypatch):
    """H and the cross moments of a later layer, in float64 from what the two streams hold when it is quantized."""
    store, seen = ActivationStore(1 << 30, tmp_path), {}
    checkpoint = Checkpoint(source(QWEN2))
    streams = Streams(
        checkpoint, ROWS, SMALL, dtype="float32", store=store, devices=jax.devices()[:1], report=lambda report: None
    )

    def capture(weight_IO, hessian_II, settings, *, cross_IO, where):
        if f"layers.1.{path}" in where:
            kept = (
                ("hidden", "float_hidden") if path == "mlp.gate" else ("hidden", "float_hidden", "inner", "float_inner")
            )
            seen["streams"] = [
                {name: np.array(store.get(name, b)) for name in kept} for b in range(len(streams.batches))
            ]
            seen["got"] = np.array(weight_IO), np.array(hessian_II), np.array(cross_IO)
        return quantize_matrix(weight_IO, hessian_II, settings, cross_IO=cross_IO, where=where)

    monkeypatch.setattr(streams_module, "quantize_matrix", capture)
    streams.start()
    for layer in range(2):
        streams.quantize_layer(layer)
    weight_IO, hessian_II, cross_IO = (each.astype(np.float64) for each in seen["got"])
    square_II, product_IO, tokens = 0, 0, 0
    scale = checkpoint.read_vector("layers.1.mlp_norm.scale").astype(np.float64)
    for batch, held in zip(streams.batches, seen["streams"], strict=True):
        for row, length in enumerate(batch.lengths_B):
            part = {name: array[row, :length].astype(np.float64) for name, array in held.items()}
            if path == "mlp.gate":
                x, exact = (
                    h / np.sqrt((h * h).mean(-1, keepdims=True) + checkpoint.config.norm_epsilon) * scale
                    for h in (part["hidden"], part["float_hidden"])
                )
                missing = (exact - x) @ weight_IO
            else:
                x = part["inner"]
                missing = (part["float_inner"] - x) @ weight_IO + part["float_hidden"] - part["hidden"]
            square_II, product_IO, tokens = square_II + x.T @ x, product_IO + x.T @ missing, tokens + length
    assert tokens == sum(map(len, ROWS))
    for got, want in ((hessian_II, square_II / tokens), (cross_IO, product_IO / tokens)):
        assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


def test_devices_and_disk_change_nothing(tmp_path, monkeypatch):
    settings = dataclasses.replace(SMALL, scale_search=False)
    one = run(QWEN2, tmp_path / "one", settings)
    stores = []

    class Store(ActivationStore):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            stores.append(self)

    monkeypatch.setattr(pipeline_module, "ActivationStore", Store)
    for name, limits in (("disk", (0, 0)), ("device", (1 << 30, 1 << 30)), ("both", (1 << 30, 200_000))):
        run(QWEN2, tmp_path / name, settings, memory_limit=limits[0], device_limit=limits[1])
        assert same(tmp_path / "one", tmp_path / name)
    disk, device, both = stores
    assert disk.spilled > 0 and disk.moved > 0 == device.moved == device.spilled and 0 < both.moved < disk.moved
    four = run(QWEN2, tmp_path / "four", settings, devices=jax.devices()[:4])
    # But for the order of sums, which moves a scale by its last bit here and there, and integers after it.
    words = [np.asarray(Checkpoint(tmp_path / name).read("layers.0.mlp.up").weight.packed) for name in ("one", "four")]
    integers = [layout.unpack(each, 4, 128) for each in words]
    assert (integers[0] == integers[1]).mean() > 0.95
    np.testing.assert_allclose([each.error for each in one], [each.error for each in four], rtol=0.1)


def test_batches_hold_every_row_once():
    found = batches(ROWS, 100, multiple=2)
    assert sum(int(batch.lengths_B.sum()) for batch in found) == sum(map(len, ROWS))
    assert all(len(batch.ids_BT) % 2 == 0 and batch.ids_BT.size <= 200 for batch in found)
    rows = [tuple(ids[:length]) for batch in found for ids, length in zip(batch.ids_BT, batch.lengths_B, strict=True)]
    assert sorted(row for row in rows if row) == sorted(tuple(row) for row in ROWS)


class Stop(Exception):
    pass


def interrupted(case, target, settings=SMALL, rows=ROWS, after="layers.1.mlp.down", **options):
    """A run that stops when the module `after` is done, before its layer is kept."""

    def progress(report, done, total):
        if report.path == after:
            raise Stop

    with pytest.raises(Stop):
        run(case, target, settings, rows, progress=progress, **options)
    assert not target.exists()


def test_resume_gives_the_same_bytes(tmp_path, caplog):
    caplog.set_level("INFO", "qwen_jax")
    whole = run(QWEN3, tmp_path / "whole")
    target = tmp_path / "out"
    interrupted(QWEN3, target, after="layers.1.attention.output")
    reports = run(QWEN3, target)
    assert "going on after 1 finished layers" in caplog.text
    assert same(tmp_path / "whole", target)
    assert [report.path for report in reports] == [report.path for report in whole]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]  # nothing is left over


@pytest.mark.parametrize("what", ["calibration", "settings", "source", "progress.json is damaged", "layer-00000"])
def test_resume_of_something_else_starts_again(what, tmp_path, caplog):
    folder, target, rows, settings = tmp_path / "source", tmp_path / "out", ROWS, SMALL
    shutil.copytree(source(V1), folder)

    def start(**options):
        return quantize(folder, target, rows, settings, dtype="float32", **options)

    def progress(report, done, total):
        if report.path == "layers.1.mlp.down":
            raise Stop

    with pytest.raises(Stop):
        start(progress=progress)
    left = tmp_path / ".out.quantizing"
    if what == "calibration":
        rows = [*ROWS[:-1], ROWS[-1][::-1]]
    elif what == "settings":
        settings = dataclasses.replace(SMALL, bits=3)
    elif what == "source":
        shard = next(folder.glob("*.safetensors"))
        tensors = load_file(shard)
        name = next(name for name in tensors if name.endswith("h.2.mlp.w1.weight"))
        tensors[name] = tensors[name] * 1.01
        save_file(tensors, shard)
    elif what == "layer-00000":
        file = left / "layer-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (left / "progress.json").write_text((left / "progress.json").read_text()[:-20])
    start()
    assert what in caplog.text and "starting again from layer 0" in caplog.text
    shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
    quantize(folder, tmp_path / "fresh", rows, settings, dtype="float32")
    assert same(target, tmp_path / "fresh")


def test_what_stands_before_and_after_the_modules_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_jax.quantize.progress.READ_BYTES", 100_000)
    said = []
    run(QWEN2, tmp_path / "out", aside=lambda *each: said.append(each))
    size = sum(file.stat().st_size for file in source(QWEN2).glob("*.safetensors"))
    size += (source(QWEN2) / "config.json").stat().st_size
    parameters = len(list(Checkpoint(source(QWEN2)).paths))
    assert [each for each in said if each[1] == each[2]] == [
        ("Reading the source", size, size),
        ("Writing", parameters, parameters),
    ]
    assert said == sorted(said) and len(said) > 10


def test_existing_target(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        run(QWEN2, target)
    assert (target / "file").read_text() == "mine"
    run(QWEN2, target, overwrite=True)
    assert not (target / "file").exists() and (target / "config.json").exists()


def test_no_disk_space(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(pipeline_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are free, expected at least"):
        run(QWEN2, tmp_path / "out")
    assert not list(tmp_path.iterdir())


NAN, INF = np.nan, np.inf
W, A = "NaN or infinity in the weights", "NaN or infinity in the activations"


@pytest.mark.parametrize(
    ("name", "index", "value", "where"),
    [
        ("embed_tokens.weight", (511, 3), NAN, f"embedding: {W}"),  # of a token that no row holds
        ("lm_head.weight", (5, 3), INF, f"lm_head: {W}"),  # stays float
        ("norm.weight", 7, NAN, rf"final_norm\.scale: {W}"),
        ("layers.1.mlp.up_proj.weight", (3, 4), NAN, rf"layers\.1\.mlp\.up: {W}"),
        ("layers.2.mlp.down_proj.weight", (3, 4), INF, rf"layers\.2\.mlp\.down: {W}"),  # stays float
        ("layers.1.self_attn.v_proj.bias", 2, -INF, rf"layers\.1\.attention\.value\.bias: {W}"),
        ("layers.2.input_layernorm.weight", 0, NAN, rf"layers\.2\.attention_norm\.scale: {W}"),
        # Finite, but what comes of them is not: squares of the inputs, then of gate times up.
        ("layers.1.post_attention_layernorm.weight", ..., 1e25, rf"layers\.1\.mlp\.gate, layers\.1\.mlp\.up: {A}"),
        ("layers.1.post_attention_layernorm.weight", ..., 1e15, rf"layers\.1\.mlp\.down: {A}"),
        ("layers.1.self_attn.v_proj.bias", ..., 1e25, rf"layers\.1\.attention\.output: {A}"),
    ],
)
def test_what_is_not_finite_is_named(name, index, value, where, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source(QWEN2), folder)
    shard = next(folder.glob("*.safetensors"))
    tensors = {key: array.astype(np.float32) for key, array in load_file(shard).items()}
    name = name if name.startswith("lm_head") else f"model.{name}"
    tensors[name][index] = value
    save_file(tensors, shard)
    settings = dataclasses.replace(SMALL, scale_search=False, dynamic={"-:.*layers.2.*down_proj": {}})
    with pytest.raises(ValueError, match=where):
        quantize(folder, tmp_path / "out", ROWS, settings, dtype="float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "settings", "rows", "message"),
    [
        (QWEN2, SMALL, [], "calibration: no rows"),
        (QWEN2, SMALL, [np.zeros(300, int)], "row 0 has 300 tokens, the model allows 256"),
        (QWEN2, SMALL, [np.array([5, 512])], "row 0 holds ids from 5 to 512, expected 0 to 511"),
        (QWEN2, SMALL, [np.zeros((2, 2), int)], "row 0 has shape"),
        (TIED, dataclasses.replace(SMALL, lm_head=True), ROWS, "lm_head: the head of .* is its embedding"),
        (QWEN2, dataclasses.replace(SMALL, dynamic={"-:.*": {}}), ROWS, "nothing to quantize"),
    ],
)
def test_bad_arguments(case, settings, rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(case, tmp_path / "out", settings, rows)
    assert not list(tmp_path.iterdir())


def test_a_quantized_source(tmp_path):
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize(GOLDEN / V1 / "quantized", tmp_path / "out", ROWS, SMALL)

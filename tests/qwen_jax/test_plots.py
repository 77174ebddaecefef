"""Figures: the numbers in them against arithmetic of the test's own, and that every axis says what it shows."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
import matplotlib.pyplot as plt

from qwen_jax import plots
from qwen_jax.bench.decode import DecodeResult
from qwen_jax.bench.models import MODELS
from qwen_jax.plan.abstract import Storage
from qwen_jax.plan.chips import parse
from qwen_jax.plan.plan import plans
from qwen_jax.plots import kv_cache, matmul, results, style


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    assert plt.get_fignums() == []


def values(figure, axis: int, label: str) -> list[float]:
    return [
        value for line in figure.axes[axis].lines if line.get_label() == label for value in map(float, line.get_ydata())
    ]


def check_labels(figure, units=("MB", "GB", "tokens", "rows", "perplexity", "FLOP")):
    for axis in figure.axes:
        assert axis.get_title(loc="left")
        for label in (axis.get_xlabel(), axis.get_ylabel()):
            assert not label or any(unit in label for unit in units)
        assert axis.get_xlabel()


def test_memory_of_qwen_7b():
    layer = 4096 * (3 * 4096 + 4096 + 3 * 11008)
    rest = 2 * 151936 * 4096 * 2 + 65 * 4096 * 4  # embedding, head; norms in float32
    biases = 32 * 3 * 4096 * 4
    token = {16: 2 * 32 * 32 * 128 * 2, 8: 2 * 32 * 32 * (128 + 4)}
    for weight_bits, weights in ((16, 32 * layer * 2), (4, 32 * layer * (1 / 2 + 2 / 128))):
        for kv_bits in (16, 8):
            want = weights + rest + biases + 4 * 1024 * token[kv_bits]
            got = kv_cache.computed_memory("qwen-7b", batch=4, length=1024, weight_bits=weight_bits, kv_bits=kv_bits)
            assert got == pytest.approx(want / 1e9, rel=1e-3)
    figure = plots.published_cache_memory()
    check_labels(figure)
    assert len(figure.legends[0].get_texts()) == 6  # five lines and a gap


def test_cache_measurements():
    def result(kv_bits, batch, context):
        return DecodeResult("m", 4, kv_bits, batch, context, 10.0 * batch, 100, 90, 125, 0, 0.0, None)

    shapes = [(16, 1, 512), (8, 1, 512), (16, 4, 512), (8, 4, 512), (16, 1, 2048), (8, 1, 2048)]
    model = SimpleNamespace(dtype="bfloat16", config=MODELS["qwen-7b"])
    figure = plots.cache_measurements(model, [result(*shape) for shape in shapes], "a test")
    check_labels(figure)
    token = 2 * 32 * 32 * 132
    assert values(figure, 0, "8-bit cache") == pytest.approx([512 * token / 1e6, 4 * 512 * token / 1e6])
    assert values(figure, 1, "bfloat16 cache") == pytest.approx([512 * 524288 / 1e6, 2048 * 524288 / 1e6])
    assert values(figure, 2, "8-bit cache") == pytest.approx([1000 / 90, 4000 / 90])  # of the fastest round


def test_quantization():
    figure = plots.quantization(["float", "Int4"], [200e6, 50e6], [10.0, 11.0], [5.0, 20.0], "a test")
    check_labels(figure)
    words = [[text.get_text().strip() for text in axis.texts] for axis in figure.axes]
    assert words == [["200", "50  (0.25×)"], ["10.00", "11.00  (1.10×)"], ["5", "20  (4.00×)"]]


def test_meshes():
    found = plans(MODELS["qwen-72b"], Storage(), parse("v5e:2x4"), batch=8, context=2048, kv_bits=8)
    figure = plots.meshes(found, "a test")
    check_labels(figure)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][0] == "data 1 × model 8"
    assert figure.axes[1].texts[-1].get_text().endswith("does not fit")


def test_packed_word():
    for word in (0, -1, 0x12345678, -(2**31)):
        figure = plots.packed_word(word)
        shown = [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith("q = ")]
        assert shown == [f"q = {(word >> 4 * field) & 15}" for field in range(8)]


def test_roofline_points_lie_under_the_roof():
    figure = plots.roofline()
    check_labels(figure)
    lines = [line for line in figure.axes[0].lines if line.get_label().startswith("Int4")]
    assert len(lines) >= 4
    for line in lines:
        for x, y in line.get_xydata():
            assert 0 < y < min(989, 3.35 * x)
    # 8192 × 24576, one row, 40.11 µs: 2 · 8192 · 24576 / 40.11e-6
    x, y = matmul._point(8192, 24576, 1, 40.11, 0.5 + 2 / 128)
    assert y == pytest.approx(10.04, rel=1e-3) and x == pytest.approx(3.878, rel=2e-3)


def test_results_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "some.json").write_text(json.dumps({"card": "x"}))
    monkeypatch.setattr(results, "_HERE", tmp_path / "a" / "b")
    with pytest.raises(FileNotFoundError, match="some.json: in none of"):
        results.read_results("some")
    monkeypatch.setattr(results, "_HERE", tmp_path)
    assert results.read_results("some") == {"card": "x"}


def test_the_style_stays_inside():
    before = plt.rcParams["axes.grid"]
    with style.figure():
        assert plt.rcParams["axes.grid"] != before
    assert plt.rcParams["axes.grid"] == before

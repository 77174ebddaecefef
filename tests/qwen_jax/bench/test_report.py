"""`qwen-jax bench report`, the targets, and `benchmarks/hopper.py` with parts that fail and hang."""

import importlib.util
import json
import pathlib
import sys

import pytest

from qwen_jax import cli
from qwen_jax.bench import attention as attention_bench
from qwen_jax.bench import matmul as matmul_bench
from qwen_jax.bench import report

BENCHMARKS = pathlib.Path(__file__).parents[3] / "benchmarks"
FACTS = {"device": "NVIDIA H100 80GB HBM3", "driver": "580", "jax": "0.11.2", "date": "2026-11-25", "command": "it"}


def script(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_set(kind, *results, copy=3000.0):
    return {"kind": kind, "environment": FACTS, "copy_gigabytes_per_second": copy, "results": list(results)}


def matmul(rows, us, bits=4, **more):
    size = 4096 * 11008 * bits // 8
    speed = {"floor_us": size / 3e6, "of_floor": size / 3e6 / us, "of_copy": size / 3e6 / us, "bytes": size}
    named = {"in": 4096, "out": 11008, "rows": rows, "bits": bits, "group_size": 128, "kernel": "mosaic_gpu"}
    return named | {"us": us, "error": 2e-3, "gigabytes_per_second": size / us / 1e3} | speed | more


def peer(name, rows, us):
    return {"peer": name, "kind": "matmul", "in": 4096, "out": 11008, "rows": rows, "us": us}


def decode(model, batch, speed, **more):
    named = {"model": model, "bits": 4, "kv_bits": 8, "batch": batch, "context": 2048, "form": "one launch"}
    return named | {"tokens_per_second": speed, "step_ms": 1.0, "gigabytes_per_second": 1.0, "of_copy": 0.5} | more


def sets():
    heads = {"model": "qwen-7b", "batch": 8, "context": 2048, "kernel": "mosaic_gpu", "error": 1e-3, "floor_us": 40.0}
    memory = {"model": "qwen-7b", "bits": 4, "kv_bits": 8, "batch": 1, "context": 2048, "peak_bytes": 6.1e9}
    return [
        one_set("matmul", matmul(1, 13.0), matmul(64, 22.0), matmul(256, 42.0), matmul(16, 25.0, bits=8)),
        one_set("matmul", matmul(1, 27.0, kernel="xla (a sum)")),
        one_set(
            "attention",
            heads | {"kv_bits": 8, "us": 50.0, "of_copy": 0.8, "of_floor": 0.8},
            heads | {"kv_bits": 16, "us": 75.0, "of_copy": 0.9, "of_floor": 0.9},
        ),
        one_set("decode", decode("qwen-7b", 1, 400.0), decode("qwen-7b", 32, 2700.0), decode("qwen2.5-7b", 1, 1.0)),
        one_set("decode", decode("qwen-14b", 1, 0.0) | {"failed": "out of memory"}),
        one_set("memory", memory, copy=None),
        one_set("prefill", memory | {"milliseconds": 60.0, "tokens_per_second": 1.0}),
        one_set("matmul", peer("tinygemm", 1, 14.0), peer("humming", 64, 20.0), peer("humming", 256, 41.0), copy=None),
        one_set("decode", decode("qwen-7b", 1, 300.0, peer="torch", kind="decode", mode="compiled"), copy=None),
    ]


def test_targets(monkeypatch):
    marked = sets()
    script("targets", monkeypatch).mark(marked)
    few, many, most, eight = marked[0]["results"]
    assert (few["met"], few["fastest_peer"], few["aim_met"]) == (True, "tinygemm", False)  # floor 7.5, aim 10.5
    assert (many["met"], most["met"], most["aim_met"]) == (False, True, False)  # 22 > 20; 42 within 5 % of 41
    assert (eight["met"], eight["target"]) == (False, "≥ 75 % of copy")  # 60 %
    assert "met" not in marked[1]["results"][0]
    narrow, wide = marked[2]["results"]
    assert (narrow["times_16_bit"], narrow["met"]) == (1.5, False) and "met" not in wide
    one, batch, other = marked[3]["results"]
    assert one["times_peer"] == pytest.approx(4 / 3) and not one["met"]  # 390 reached, 1.35 times the peer is not
    assert batch["met"] and "met" not in other
    assert marked[5]["results"][0]["met"] and (marked[6]["results"][0]["met"], marked[6]["results"][0]["aim_met"]) == (
        True,
        False,
    )


def test_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    marked = sets()
    script("targets", monkeypatch).mark(marked)
    (tmp_path / "hopper.json").write_text(
        json.dumps(
            {"environment": FACTS, "sets": marked[1:], "parts": {"72B": {"state": "ended with 1: x", "seconds": 3}}}
        )
    )
    (tmp_path / "matmul.json").write_text(json.dumps(marked[0]))
    files = [str(tmp_path / name) for name in ("matmul.json", "hopper.json")]
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "report", *files, "--output", str(tmp_path / "out")])
    assert not exit.value.code and "report.md" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.md").read_text()
    for name in ("roofline", "peers", "attention", "decode"):
        assert f"({name}.png)" in page and (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    assert "Targets: 5 of 9 met" in page
    assert "- missed: 4096 × 11008, 4 bits, 64 rows: 22.0 µs, 34% of copy, target < 20.0 µs" in page
    assert (
        "- missed: decode qwen-7b, 8-bit cache, 1 rows, 2048 tokens, one launch: 400.0 tokens/s, 1.33 × the peer"
        in page
    )
    assert "- failed: decode qwen-14b, 8-bit cache, 1 rows, 2048 tokens, one launch: out of memory" in page
    assert "| 4096 × 11008 | 1 | 14.00 |  |" in page and "- 72B: ended with 1: x (after 3 s)" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ('{"kind": "speed", "results": []}', "found speed, expected one of matmul"),
        ("[3]", "found int"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"other.json: .*{message}"):
        report.read([path])


def test_hopper_survives_its_parts(tmp_path, monkeypatch, capsys):
    hopper = script("hopper", monkeypatch)
    record = json.dumps(one_set("matmul", matmul(1, 13.0)))
    ours = f"import sys; open(sys.argv[1], 'w').write({record!r})"

    def parts(options, folder):
        python = [sys.executable, "-c"]
        return {
            "matmul": hopper.Part([*python, ours, str(folder / "matmul.json")], 9),
            "7B": hopper.Part([*python, "import time; time.sleep(60)"], 9),
            "torch_matmul": hopper.Part([*python, f"print({json.dumps(peer('tinygemm', 1, 14.0))!r})"], 9, True),
            "torch_decode": hopper.Part([*python, "raise SystemExit('no card')"], 9, True),
        }

    monkeypatch.setattr(hopper, "parts", parts)
    output = tmp_path / "h100.json"
    only = ["matmul", "7B", "torch_matmul", "torch_decode"]
    monkeypatch.setattr(sys, "argv", ["hopper.py", "--only", *only, "--limit", "3", "--output", str(output)])
    with pytest.raises(SystemExit) as exit:
        hopper.main()
    assert exit.value.code == 1
    found = json.loads(output.read_text())
    states = {name: part["state"] for name, part in found["parts"].items()}
    assert states["matmul"] == states["torch_matmul"] == "done"
    assert states["7B"].startswith("not done in its time") and states["torch_decode"] == "ended with 1: no card"
    assert [one["results"][0]["us"] for one in found["sets"]] == [13.0, 14.0]
    assert found["sets"][0]["results"][0]["met"]  # against the peer of the same call
    assert "not well: 7B, torch_decode" in capsys.readouterr().out
    assert report.read([output])[1].keys() == {"7B", "torch_decode"}


def test_the_parts_of_hopper(tmp_path, monkeypatch, capsys):
    """Every command of ours is one that the command line takes, and writes its results where they are looked for."""
    asked = []
    for module in (matmul_bench, attention_bench):
        monkeypatch.setattr(module, "measure", lambda cases, **options: asked.append((cases, options)) or (3000.0, []))
    hopper = script("hopper", monkeypatch)
    options = hopper.argparse.Namespace(shapes=hopper.SHAPES, rows=hopper.ROWS, batch=(1, 8), context=(2048,))
    options.models, options.patience, options.only = ["7B"], 9.0, ["humming"]
    found = hopper.parts(options, tmp_path)
    for name in ("matmul", "matmul_int8", "matmul_xla", "attention"):
        words = found[name].command
        with pytest.raises(SystemExit) as exit:
            cli.main(words[words.index("bench") :])
        assert not exit.value.code and json.loads((tmp_path / f"{name}.json").read_text())["results"] == []
    four, eight, xla, heads = (settings for _, settings in asked)
    assert (four["bits"], eight["bits"], xla["kernels"], heads["batch"]) == ([4], [8], "xla", [1, 8])
    assert four["rows"] == list(hopper.ROWS) and max(eight["rows"]) == 64 and len(asked[0][0]) == 5
    model = found["7B"].command
    assert "--prefill" in model and all(pathlib.Path(found[n].command[1]).is_file() for n in ("7B", "humming"))
    assert len(hopper.compiling(options)) == 10

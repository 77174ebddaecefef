"""`qwen-jax bench tune`: what is tried fits, what is kept is fastest and right, and a damaged table is an error."""

import json

import pytest

from pallas_kernels.kv_attention import mosaic_gpu_decode
from pallas_kernels.kv_attention import mosaic_gpu_tuned as attention_table
from pallas_kernels.quantized_matmul import MatmulShape, mosaic_gpu, mosaic_gpu_tuned
from qwen_jax import cli
from qwen_jax.bench import attention, matmul, tune

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(tune, "_chip", lambda *_: H100)


@pytest.mark.parametrize("sizes", [(4, 4096, 11008, 1), (4, 4096, 12288, 64), (4, 4096, 12288, 256), (8, 512, 192, 16)])
def test_candidates_fit(sizes):
    bits, inputs, outputs, rows = sizes
    found = tune.matmul_candidates(*sizes)
    assert 1 < len(found) <= 24 and len(set(map(str, found))) == len(found)
    for values in found:
        assert mosaic_gpu.fits(mosaic_gpu.tiling_of(values), rows, inputs, outputs, bits, 128)
    shipped = mosaic_gpu.tuned(H100).get(mosaic_gpu_tuned.key(bits, inputs, outputs), {}).get(str(rows))
    assert shipped is None or shipped["tiling"] in [values[: len(shipped["tiling"])] for values in found]


def test_the_fastest_right_tiling_is_kept(hopper, tmp_path, monkeypatch):
    times = {"[1, 2, 2]": (5.0, 2e-3), "[1, 1, 3]": (1.0, 0.5), "[2, 2, 2]": (8.0, 2e-3)}

    def measure(cases, *, rows, bits, tilings, patience):
        [(inputs, outputs)], [width], [count] = cases, bits, rows
        named = {"in": inputs, "out": outputs, "bits": width, "rows": count}
        tried = [
            named | {"tiling": json.loads(t), "origin": "tried", "us": u, "error": e} for t, (u, e) in times.items()
        ]
        used = {"tiling": [9, 2, 2], "origin": "computed", "us": 9.0, "error": 2e-3}
        failed = {"tiling": [4, 4, 4], "origin": "tried", "failed": "out of memory"}
        return 3000.0, [*tried, named | used, named | failed]

    monkeypatch.setattr(tune.matmul, "measure", measure)
    path = tmp_path / "table.json"
    tune.tune_matmul([(512, 192)], rows=[3], bits=[8], output=path)
    found = mosaic_gpu_tuned.read(path)
    assert found.pop("8 bits, 512 x 192") == {"3": {"tiling": [1, 2, 2], "us": 5.0}}  # [1, 1, 3] was wrong
    assert found == mosaic_gpu.tuned(H100)  # the others as they were
    monkeypatch.setattr(mosaic_gpu, "tuned_path", lambda chip: path)
    for clear in (mosaic_gpu.tuned.cache_clear, mosaic_gpu._choose_tiling.cache_clear):
        clear()
    try:
        tiling, origin = mosaic_gpu.choose_tiling(MatmulShape(2, 512, 192, bits=8, layout=mosaic_gpu.LAYOUT), H100)
        assert (list(vars(tiling).values()), origin) == ([1, 2, 2], "tuned")
    finally:
        monkeypatch.undo()
        for clear in (mosaic_gpu.tuned.cache_clear, mosaic_gpu._choose_tiling.cache_clear):
            clear()


def test_noise_changes_nothing():
    used = {"tiling": [1], "origin": "tuned", "us": 5.0, "error": 1e-3}
    other = {"tiling": [2], "origin": "tried", "us": 4.95, "error": 1e-3}
    assert tune.fastest([used, other], lambda record: record["origin"] != "tried") is used
    assert tune.fastest([used, other | {"us": 4.8}], lambda record: record["origin"] != "tried")["tiling"] == [2]
    assert tune.fastest([used | {"error": 1.0}], lambda record: True) is None


def test_a_plan_of_attention(hopper, tmp_path, monkeypatch):
    def measure(models, *, batch, context, kv_bits, plans):
        records = []
        for plan in (None, *plans):
            for rows in batch:
                fast = plan is not None and (plan["blocks"], plan["stages"], plan["blocks_a_multiprocessor"]) == (
                    2,
                    6,
                    1,
                )
                found = {"model": "m", "kv_bits": 8, "batch": rows, "us": 5.0 if fast else 9.0, "error": 1e-3}
                records.append(found | ({} if plan is None else {"plan": plan}))
        return 3000.0, records

    monkeypatch.setattr(tune.attention, "measure", measure)
    dims, path = attention.parse_shape("32x4x128"), tmp_path / "table.json"
    tune.tune_attention([("m", dims)], kv_bits=[8], batch=[1, 8], context=[64], output=path)
    first, *others = attention_table.read(path)
    assert {name: first[name] for name in attention_table.NUMBERS} == {
        "blocks": 2,
        "stages": 6,
        "blocks_a_multiprocessor": 1,
    }
    assert first["when"] == {"quantized": True, "share": 8, "head_dim": 128, "biased": False}
    assert others == mosaic_gpu_decode.tuned()
    assert tune.best_plan([{"us": 1.0, "error": 0.0}], 1) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", 'no object "entries"'),
        ('{"entries": {"4 bit": {}}}', "entry '4 bit'"),
        (
            '{"entries": {"4 bits, 64 x 64": {"1": {"tiling": [1, 2]}}}}',
            r"4 bits, 64 x 64, '1' rows: .*expected a tiling",
        ),
        ('{"entries": {"4 bits, 64 x 64": {"1": {"tiling": [1, 2, 0]}}}}', "expected a tiling"),
        ('{"entries": {"4 bits, 64 x 64": {"0": {"tiling": [1, 2, 2]}}}}', "'0' rows"),
        ('{"entries": {"4 bits, 64 x 64": {"64": {"tiling": [1, 65, 1, 1, 2, true]}}}}', "expected a tiling"),
        ('{"entries": {"4 bits, 4096 x 11008": {"16": {"tiling": [99, 4, 9]}}}}', r"\[99, 4, 9\] does not fit"),
    ],
)
def test_a_damaged_table(text, message, tmp_path, monkeypatch):
    path = tmp_path / "NVIDIA_H100.json"
    path.write_text(text)
    monkeypatch.setattr(mosaic_gpu, "tuned_path", lambda chip: path)
    with pytest.raises(ValueError, match=f"NVIDIA_H100.json.*{message}"):
        mosaic_gpu.tuned.__wrapped__(H100)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([], 'no list "plans"'),
        ([{"when": {}, "blocks": 1, "stages": 0, "blocks_a_multiprocessor": 1}], "plan 0: .*expected the conditions"),
        ([{"when": {"heads": 1}, "blocks": 1, "stages": 2, "blocks_a_multiprocessor": 1}], "plan 0"),
        ([{"when": {"share": 1}, "blocks": 1, "stages": 2, "blocks_a_multiprocessor": 1}], "could be without a plan"),
    ],
)
def test_a_damaged_table_of_attention(plans, message, tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps({"plans": plans}))
    with pytest.raises(ValueError, match=message):
        attention_table.read(path)


def test_without_a_hopper_gpu(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "tune", "--shape", "64x64"])
    assert "found the device cpu, expected one of H100" in capsys.readouterr().err


def test_what_is_tried_is_lowered():
    """A record of the tiling tried beside that in use."""
    job = {"in": 256, "out": 128, "bits": 4, "group_size": 128, "dtype": "bfloat16", "kernels": "auto"}
    found = [named for _, named in matmul._forms(job, 1, [[1, 1, 1], [1, 2, 1]], H100)]
    assert {tuple(named["tiling"]) for named in found[1:]} <= {(1, 1, 1), (1, 2, 1)} and len(found) >= 2
    assert [named["origin"] for named in found][1:] == ["tried"] * (len(found) - 1)

"""Whole runs: interrupted and taken up, refused, merged; and through the command line."""

import dataclasses
import json
import shutil

import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from converters import peft
from qwen_jax import QwenForCausalLM, cli
from qwen_jax.config import ModelConfig
from qwen_jax.errors import CheckpointError
from qwen_jax.finetune import Example, FinetuneSettings, collect, finetune, merge
from qwen_jax.finetune.programs import schedule
from tests.edited import GOLDEN
from tests.successor import write_successor

SMALL = GOLDEN / "qwen2-int4-per-channel"
SETTINGS = FinetuneSettings(
    rank=4, learning_rate=1e-2, epochs=2, batch_size=2, length=32, save_every=2, keep=2, dropout=0.1, weight_decay=0.01
)


def dataset(seed=0, count=8):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, 30, count)
    return collect([Example(rng.integers(0, 64, n).astype(np.int32), np.ones(n, bool)) for n in sizes], 32, "test")


def run(out, settings=SETTINGS, **arguments):
    return finetune(SMALL / "quantized", dataset(), out, settings, dtype="float32", **arguments)


class Interruption(Exception):
    pass


def test_an_interrupted_run_comes_to_the_same_losses(tmp_path):
    whole = run(tmp_path / "whole")

    def interrupt(line, steps):
        if line["step"] == 5:
            raise Interruption

    with pytest.raises(Interruption):
        run(tmp_path / "parts", progress=interrupt)
    assert not (tmp_path / "parts" / peft.WEIGHTS).exists()
    parts = run(tmp_path / "parts")
    assert parts.resumed_from == 4 and whole.resumed_from == 0
    assert parts.losses == whole.losses and len(whole.losses) == whole.steps
    first, second = (load_file(tmp_path / name / peft.WEIGHTS) for name in ("whole", "parts"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert whole.losses[-1] < whole.losses[0]
    kept = sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir())
    assert len(kept) == 2 and kept[-1] == f"step-{whole.steps:08}"
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, whole.steps + 1))
    assert (tmp_path / "parts" / "loss.png").read_bytes().startswith(b"\x89PNG")
    # the same call once more has nothing to do
    assert run(tmp_path / "parts").resumed_from == whole.steps
    # another one is refused
    with pytest.raises(CheckpointError, match="holds a run with other settings"):
        run(tmp_path / "parts", FinetuneSettings(rank=8, length=32))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="holds something else"):
        run(tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").exists()


def test_an_adapter_with_patterns_goes_on(tmp_path):
    """Ranks and alphas by module, one layer left out, rsLoRA: what is written is of the same kind, only trained."""
    start = SMALL / "lora" / "peft_patterns"
    settings = dataclasses.replace(SETTINGS, epochs=1, dropout=0.0, weight_decay=0.0)
    finetune(SMALL / "source", dataset(count=2), tmp_path / "out", settings, dtype="float32", adapter=start)
    before, after = (load_file(folder / peft.WEIGHTS) for folder in (start, tmp_path / "out"))
    assert {name: array.shape for name, array in before.items()} == {name: a.shape for name, a in after.items()}
    assert all((before[name] != after[name]).any() for name in before if "lora_B" in name)
    old, new = (json.loads((folder / peft.CONFIG).read_text()) for folder in (start, tmp_path / "out"))
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "exclude_modules"):
        assert new[key] == old[key], key
    config = ModelConfig.from_folder(SMALL / "source")
    first, second = (peft.read(folder, config) for folder in (start, tmp_path / "out"))
    assert {path: term.scale for path, term in first.modules.items()} == {
        path: term.scale for path, term in second.modules.items()
    }


def test_bad_settings_are_refused(tmp_path):
    for change, message in (
        ({"rank": 0}, "rank=0: expected at least 1"),
        ({"dropout": 1.0}, "dropout=1.0: expected at least 0 and below 1"),
        ({"schedule": "step"}, "schedule='step' is none of"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            FinetuneSettings(**change)
    with pytest.raises(ValueError, match="length=1000000: expected at most the model's"):
        run(tmp_path / "long", FinetuneSettings(length=1_000_000))
    with pytest.raises(ValueError, match="an example has .* tokens, rows have 16"):
        run(tmp_path / "short", FinetuneSettings(length=16))
    with pytest.raises(FloatingPointError, match="step 2: loss nan"):
        run(tmp_path / "hot", FinetuneSettings(length=32, learning_rate=1e30, clip=0, warmup=0, batch_size=2))


def test_schedule():
    rate = schedule(FinetuneSettings(learning_rate=1.0, warmup=4, schedule="cosine"), 12)
    np.testing.assert_allclose([float(rate(step)) for step in range(4)], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    wanted = [0.5 * (1 + np.cos(np.pi * step / 8)) for step in range(8)]
    np.testing.assert_allclose([float(rate(4 + step)) for step in range(8)], wanted, rtol=1e-5, atol=1e-6)
    assert isinstance(schedule(FinetuneSettings(schedule="constant", warmup=0), 5), type(optax.constant_schedule(1)))


# -- merging -----------------------------------------------------------------------------------------------------------


def error(found, wanted):
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


def test_merged_weights_give_the_adapter_s_logits(tmp_path):
    for name in ("adapter", "peft_patterns"):
        adapter, ids = SMALL / "lora" / name, np.load(SMALL / "golden.npz")["ids"]
        report = merge(SMALL / "source", adapter, tmp_path / name)
        beside = QwenForCausalLM.from_pretrained(SMALL / "source", dtype="float32", adapter=adapter)(ids)
        merged = QwenForCausalLM.from_pretrained(tmp_path / name, dtype="float32")(ids)
        assert report.modules and report.worst is not None
        assert error(merged, np.asarray(beside, np.float64)) < max(1e-5, 3 * report.lost)
        assert (tmp_path / name / "generation_config.json").exists() == (
            SMALL / "source" / "generation_config.json"
        ).exists()


def test_a_trained_half_of_a_tied_pair_unties_it(tmp_path):
    source = GOLDEN / "qwen3-gptqmodel-int4-g32-dynamic-tied" / "source"
    settings = FinetuneSettings(rank=2, modules_to_save=("lm_head",), learning_rate=1e-2, length=32, batch_size=2)
    finetune(source, dataset(), tmp_path / "adapter", settings, dtype="float32")
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = dataset().examples[0].ids_T[None]
    beside = QwenForCausalLM.from_pretrained(source, dtype="float32", adapter=tmp_path / "adapter")(ids)
    merged = QwenForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")(ids)
    assert error(merged, np.asarray(beside, np.float64)) < 2e-3  # the source is 16-bit


def test_a_quantized_base_is_refused_with_two_ways_out(tmp_path):
    with pytest.raises(CheckpointError, match="is quantized .* Either keep the adapter beside it .* or merge into the"):
        merge(SMALL / "quantized", SMALL / "lora" / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# -- command line ------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    model = write_successor(tmp_path / "model", "AB")
    data = tmp_path / "talk.jsonl"
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "CD"}]}
    data.write_text((json.dumps(talk) + "\n") * 3)

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments)])
        return ended.value.code, capsys.readouterr()

    options = (
        "--rank",
        "2",
        "--length",
        "64",
        "--batch-size",
        "1",
        "--dtype",
        "float32",
        "--modules-to-save",
        "lm_head",
    )
    code, captured = command("finetune", model, data, tmp_path / "out", *options, "--json")
    assert code == 0, captured.err
    result = json.loads(captured.out)
    assert result["examples"] == 3 and len(result["losses"]) == result["steps"] and result["plot"]
    code, captured = command("merge", model, tmp_path / "out", tmp_path / "merged")
    assert code == 0 and "projections changed, 1 modules replaced" in captured.out
    code, captured = command(
        "generate", model, "q", "--adapter", tmp_path / "out", "--max-new-tokens", "2", "--temperature", "0", "--json"
    )
    assert code == 0, captured.err
    data.write_text("[]\n")
    code, captured = command("finetune", model, data, tmp_path / "out2")
    assert code == 1 and "talk.jsonl: line 1: is list, expected an object" in captured.err
    shutil.rmtree(tmp_path / "merged")

"""The command line: quick help, one-line errors, exit codes, JSON, and each command end to end on small models."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_jax import cli
from tests import demo_run
from tests.successor import write_successor

GOLDEN = Path(__file__).parents[1] / "golden"
INT4 = GOLDEN / "qwen2-int4-g64-actorder-asym" / "quantized"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """No test reads or writes the user's cache, and the compilation cache stays the test suite's."""
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")  # tables are not folded
    monkeypatch.setattr("qwen_jax.compilation_cache.enable", lambda: None)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def successor(tmp_path):
    return write_successor(tmp_path / "successor", "Hi 😊!")


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; sys.argv = ['qwen-jax', '--help']\n" + (
        "from qwen_jax.cli import main\ntry: main()\n"
        "finally: print({'jax', 'numpy', 'transformers', 'flax'} & set(sys.modules), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):  # the best of three: a busy machine may be slow once
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and done.stderr.strip() == "set()"
        if seconds[-1] < 0.5:
            break
    assert all(name in done.stdout for name in cli.COMMANDS)
    assert min(seconds) < 0.5 or os.getloadavg()[0] > os.cpu_count(), seconds


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_help_with_examples(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and "Examples" in out and f"qwen-jax {command}" in out and "--debug" in out


def test_version(run):
    from qwen_jax import __version__

    assert run("--version") == (0, f"qwen-jax {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["nothing"], ["info"], ["generate", "x", "y", "--seed", "many"], []])
def test_wrong_usage_is_exit_code_2(run, arguments):
    assert run(*arguments)[0] == 2


def test_an_error_is_one_line(run):
    code, out, err = run("info", "/no/such/folder")
    assert code == 1 and out == ""
    assert err == "qwen-jax: /no/such/folder: no such folder, and not a Hub id (owner/name) either. Check the path.\n"


def test_an_unexpected_error_is_one_line_that_names_its_type(run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("qwen_jax.info.describe", broken)
    code, _, err = run("info", "x")
    assert code == 1
    assert err == "qwen-jax: RuntimeError: two lines (run again with --debug for the traceback)\n"


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["info", "/no/such/folder", "--debug"])


def test_interrupt_is_exit_code_130(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_jax.info.describe", interrupt)
    code, out, err = run("info", "x")
    assert code == 130 and "Traceback" not in out + err


def test_info(run):
    code, out, _ = run("info", INT4, "--json")
    facts = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert facts["quantization"] == {
        "method": "gptq",
        "format": "gptq",
        "bits": 4,
        "group_size": 64,
        "modules": 21,
        "asymmetric_modules": 21,
        "act_order_modules": 21,
        "zero_points": ["stored minus 1"],
        "exceptions": [],
    }
    # 3 layers, 1 key/value head of 32: two numbers each for keys and values and, with 8 bits, their scales and minimums
    architecture = facts["architecture"]
    heads = 2 * architecture["num_layers"] * architecture["num_kv_heads"]
    head_dim = architecture["head_dim"]
    assert facts["kv_bytes_per_token"] == {"16-bit": heads * head_dim * 2, "8-bit": heads * (head_dim + 4)}
    files = sum(file.stat().st_size for file in INT4.glob("*.safetensors"))
    assert 0 < files - facts["bytes"]["total"] < 20_000  # the rest is the header
    assert {row["operation"] for row in facts["kernels"]["operations"]} >= {
        "query + key + value",
        "gate + up",
        "lm_head",
    }
    text = run("info", INT4)[1]
    for word in ("qwen2", "stored minus 1", "act-order", "rope_theta", "query + key + value", "8-bit"):
        assert word in text


def test_info_of_mixed_modules_for_another_chip(run):
    folder = GOLDEN / "qwen3-gptqmodel-int4-g32-dynamic-tied" / "quantized"
    facts = json.loads(run("info", folder, "--json", "--chip", "NVIDIA H100 80GB HBM3")[1])
    assert facts["quantization"]["exceptions"] == ["layers.0.mlp.down: float32"]
    assert facts["kernels"]["chip"] == "NVIDIA H100 80GB HBM3"
    assert facts["bytes"]["lm_head"] == 0


def test_convert_then_info_agrees(run, tmp_path):
    code, out, _ = run("convert", INT4, tmp_path / "converted", "--json")
    assert code == 0 and json.loads(out)["bytes"] > 0
    before, after = (json.loads(run("info", folder, "--json")[1]) for folder in (INT4, tmp_path / "converted"))
    assert before["architecture"] == after["architecture"]
    assert before["bytes"]["total_in_16_bits"] == after["bytes"]["total_in_16_bits"]
    assert sorted(map(str, before["kernels"]["operations"])) == sorted(map(str, after["kernels"]["operations"]))
    assert after["quantization"]["act_order_modules"] > 0
    code, _, err = run("convert", INT4, tmp_path / "converted")
    assert code == 1 and "is there already" in err and err.count("\n") == 1


def test_generate(run, successor):
    code, out, _ = run("generate", successor, "H", "--max-new-tokens", 9, "--kv8")
    assert (code, out) == (0, "Hi 😊!\n")
    code, out, _ = run("generate", successor, "H", "--max-new-tokens", 2, "--json")
    assert code == 0 and json.loads(out)["text"] == "i " and json.loads(out)["new_tokens"] == 2


def test_generate_reads_standard_input_and_refuses_nothing(run, successor, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("H\n"))
    assert run("generate", successor, "-")[1] == "Hi 😊!\n"
    code, _, err = run("generate", successor, "")
    assert code == 1 and err.startswith("qwen-jax: PROMPT: is empty")


def test_bad_sampling_values_are_one_line(run, successor):
    code, _, err = run("generate", successor, "H", "--top-p", 2)
    assert code == 1 and err.startswith("qwen-jax: top_p=2.0: expected") and err.count("\n") == 1


def test_chat_from_standard_input(run, successor, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n\n/reset\nsecond\n/exit\nnever\n"))
    code, out, _ = run("chat", successor, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert answers == [{"question": question, "answer": "Hi 😊!"} for question in ("first", "second")]


def test_demo_from_nothing():
    """As a user runs it, in a process of its own; a second run finds checkpoint and programs."""
    runs = (demo_run.first_run(), demo_run.run())
    (first, said), (second, said_again) = [(json.loads(out.splitlines()[-1]), said) for out, said in runs]
    assert "Reading the GGUF file" in said and "Quantizing to Int4" in said
    assert "Quantizing" not in said_again
    # What exactly it says hangs on the last bits of the quantization, and so on the processor.
    assert "photosynthesis" in first["answer"] and re.search("sunlight|plants|energy", first["answer"])
    assert first["answer"] == second["answer"]
    assert first["kv_cache"] == "8-bit" and first["kv_bytes_per_token"] == 12240
    assert first["checkpoint_bytes"] < 0.45 * first["checkpoint_bytes_in_bf16"]
    assert second["first_token_seconds"] < first["first_token_seconds"]
    assert first["new_tokens"] > 20 and first["decode_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("installed", "vendor", "platforms"),
    [
        ({"libtpu"}, "0x8086", "cpu"),
        ({"libtpu"}, "0x1ae0", None),  # a TPU, or Google's network card: JAX has to look
        ({"libtpu", "jax_cuda13_plugin"}, "0x10de", None),
        (set(), "0x8086", None),
    ],
)
def test_jax_is_told_when_there_is_no_tpu(monkeypatch, tmp_path, installed, vendor, platforms):
    (tmp_path / "0000:00:01.0").mkdir()
    (tmp_path / "0000:00:01.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(cli, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    cli._pass_over_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == platforms

"""The command line in a shell: completion, colours, interruption; nothing half-written stays behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.qwen_jax.test_cli import INT4, own_cache, run  # noqa: F401  (fixtures)
from tests.qwen_jax.test_cli_chat import Terminal
from tests.successor import write_successor


def complete(shell, line):
    """What the shell would offer at the end of a line."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    done = subprocess.run(
        [sys.executable, "-m", "qwen_jax"],
        env=os.environ | asked | {"_QWEN_JAX_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_completion():
    assert complete("bash", "qwen-jax qu").split() == ["quantize"]
    assert {"--kernels", "--kv8"} <= set(complete("bash", "qwen-jax chat model --k").split())
    assert '"generate":"Continue a text' in complete("zsh", "qwen-jax gen")
    assert complete("fish", "qwen-jax inf").startswith("info\t")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed(run, shell):  # noqa: F811
    code, out, _ = run("--show-completion", shell)
    assert code == 0 and "_QWEN_JAX_COMPLETE" in out and "qwen-jax" in out


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["chat", "--help"], ["info", INT4], ["info", "/none"], ["plan", "qwen-7b", "--topology=h100"]],
)
def test_no_colours_without_a_terminal(run, monkeypatch, arguments):  # noqa: F811
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # these ask for colours all the same
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    _, out, err = run(*arguments)
    assert out + err and "\x1b" not in out + err


def test_an_interrupted_conversion_leaves_nothing(run, monkeypatch, tmp_path):  # noqa: F811
    from converters.huggingface import Checkpoint

    read, calls = Checkpoint.read, []

    def interrupted(self, path, *args, **options):
        calls.append(path)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return read(self, path, *args, **options)

    monkeypatch.setattr(Checkpoint, "read", interrupted)
    code, out, err = run("convert", INT4, tmp_path / "target")
    assert code == 130 and out == "" and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_quantization_goes_on(run, monkeypatch, tmp_path):  # noqa: F811
    from qwen_jax.quantize.streams import Streams

    source = write_successor(tmp_path / "source", "abc", layers=2)
    (tmp_path / "text.txt").write_text("some calibration text " * 20)
    command = ["quantize", source, tmp_path / "target", "--calibration", tmp_path / "text.txt", "--row-length", 32]
    command += ["--group-size", 32, "--rows", 2]
    quantize_layer, layers = Streams.quantize_layer, []

    def interrupted(self, number):
        layers.append(number)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return quantize_layer(self, number)

    monkeypatch.setattr(Streams, "quantize_layer", interrupted)
    code, _, err = run(*command)
    assert code == 130 and not (tmp_path / "target").exists() and "the same command goes on" in err
    code, out, _ = run(*command)
    assert code == 0 and "14 modules" in out and layers == [0, 1, 1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source", "target", "text.txt"]


def test_ctrl_c(tmp_path):
    # its tokens go round in a circle that no stop token is part of
    model = write_successor(tmp_path / "model", "abc", end=ord("d"))
    terminal = Terminal("generate", model, "\n", "--max-new-tokens", 4000, QWEN_JAX_CACHE=str(tmp_path / "cache"))
    terminal.wait("abcd")
    os.killpg(terminal.process.pid, signal.SIGINT)
    rest = terminal.rest()
    assert terminal.close() == 130 and "Traceback" not in rest


def test_an_interruption_in_a_callback_is_not_lost():
    code = (
        "import gc, os, signal, sys, time, types\n"
        "import qwen_jax.cli\n"
        "from qwen_jax import __main__\n"
        "def interrupt(*args):\n"
        "    gc.callbacks.clear()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.01)\n"
        "def command():\n"
        "    gc.callbacks.append(interrupt)\n"
        "    gc.collect()\n"
        "    time.sleep(20)\n"
        "qwen_jax.cli.main = command\n"
        "__main__.main()"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "" and time.monotonic() - start < 15

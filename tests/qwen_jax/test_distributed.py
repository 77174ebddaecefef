"""Real processes on this machine: two of four CPU devices each, collectives by gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from converters.safetensors_files import folder_tensors
from qwen_jax import cli, distributed
from tests.qwen_jax.test_golden import GOLDEN, golden, load, relative_error
from tests.successor import write_successor

CASE = "qwen2-int4-g64-actorder-asym"
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI"))},
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    "PYTHONUNBUFFERED": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # they compile more than they compute
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def begin(command, count=2, **environment):
    """Processes that run `command(coordinator, process)`."""
    coordinator = f"localhost:{free_port()}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *command(coordinator, n)], env=ENVIRONMENT | environment, **pipes)
        for n in range(count)
    ]


def ends(processes, seconds):
    """(exit code, stdout, stderr) of each, all killed if one is not over in time."""
    until = time.monotonic() + seconds
    try:
        done = [process.communicate(timeout=max(until - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, done, strict=True)]


def worker(action: str, *arguments: str, timeout=120):
    """Code that starts this process and does `action`, a function below, with the model on all devices."""
    call = f"{action}({', '.join(map(repr, arguments))})"
    lines = f"from tests.qwen_jax import test_distributed as t; t.start(c, n, {timeout}); t.{call}"
    return lambda coordinator, n: ["-c", f"c, n = {coordinator!r}, {n}; {lines}"]


# -- in the processes --------------------------------------------------------------------------------------------------


def start(coordinator, process, timeout):
    distributed.HEARTBEAT = 10
    distributed.start(coordinator, 2, process, timeout=timeout)
    devices = int(os.environ["JAX_NUM_CPU_DEVICES"])
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 2 * devices, devices)


def model(mesh):
    from qwen_jax import QwenForCausalLM
    from qwen_jax.sharding import parse_mesh

    folder = GOLDEN / CASE / "quantized"
    return QwenForCausalLM.from_pretrained(folder, dtype="float32", mesh=parse_mesh(mesh))


def answer(mesh, path):
    """Logits of the prompt and of a decode step, and greedy tokens; each process writes its own."""
    many, want = model(mesh), golden(CASE)
    last, cache = many.prefill(want["ids"])
    step, _ = many.decode(want["gptq_greedy"][:, :1], cache)
    tokens = many.generate(want["ids"], max_new_tokens=8, do_sample=False, eos_token_id=[])
    np.savez(f"{path}.{jax.process_index()}.npz", last=last, step=step, tokens=tokens)


def decode_until(what):
    """Process 1 dies, or sleeps, instead of entering the third decode step."""
    many, want = model("1x2"), golden(CASE)
    _, cache = many.prefill(want["ids"])
    with distributed.command():
        for number in range(4):
            if number == 2 and what == "asleep":
                distributed._timeout = 5  # from here on: compiling may take longer
            if number == 2 and jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGKILL) if what == "killed" else time.sleep(300)
            _, cache = many.decode(want["gptq_greedy"][:, :1], cache)
            print(f"step {number} {time.time()}")


def bytes_read(folder, mesh, path):
    """Loads a model; writes how many bytes of weights were read for each tensor of the file."""
    from converters import safetensors_files
    from qwen_jax import QwenForCausalLM
    from qwen_jax.sharding import parse_mesh

    read, box, counts = safetensors_files.StoredTensor.read, safetensors_files.StoredTensor.read_box, {}

    def counted(function, counts):
        def wrapper(tensor, *arguments):
            array = function(tensor, *arguments)
            counts.setdefault(tensor.name, []).append(array.nbytes)
            return array

        return wrapper

    inside: dict = {}  # what `read_box` reads through `read` counts once
    safetensors_files.StoredTensor.read = counted(read, inside)
    safetensors_files.StoredTensor.read_box = counted(box, counts)
    QwenForCausalLM.from_pretrained(folder, dtype="float32", mesh=parse_mesh(mesh))
    Path(f"{path}.{jax.process_index()}.json").write_text(json.dumps(counts))


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["2x4", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1x8", "1x2x4"))])
def test_two_processes_equal_one_device(tmp_path, mesh):
    done = ends(begin(worker("answer", mesh, str(tmp_path / "out"))), 240)
    assert [code for code, *_ in done] == [0, 0], done
    one, want = load(CASE, "gptq"), golden(CASE)
    last, cache = one.prefill(want["ids"])
    step, _ = one.decode(want["gptq_greedy"][:, :1], cache)
    for process in range(2):
        got = np.load(tmp_path / f"out.{process}.npz")
        assert relative_error(got["last"], last) < 1e-5
        assert relative_error(got["step"], step) < 1e-5
        np.testing.assert_array_equal(got["tokens"][:, -8:], want["gptq_greedy"])


@pytest.mark.parametrize("case", [
    pytest.param("qwen1-int4-g32/source", marks=pytest.mark.slow),
    "qwen1-int4-g32/quantized",
    "qwen2-int4-per-channel/quantized",
])  # fmt: skip
def test_each_process_reads_its_own_part(tmp_path, case):
    """Of every matrix, packed words and scales of groups, two processes read a half each."""
    folder = GOLDEN / case
    done = ends(begin(worker("bytes_read", str(folder), "1x2", str(tmp_path / "read")), JAX_NUM_CPU_DEVICES="1"), 200)
    assert [code for code, *_ in done] == [0, 0], done
    tensors = folder_tensors(folder)
    for process in range(2):
        read = json.loads((tmp_path / f"read.{process}.json").read_text())
        assert len(read) > 10
        for name in read:
            whole = name.endswith(".scales") and tensors[name].shape[0] == 1  # one group a column: every row needs it
            assert sum(read[name]) <= (1 if whole else 0.51) * tensors[name].nbytes, name


@pytest.mark.parametrize("what", ["killed", "asleep"])
def test_a_lost_or_stuck_process_ends_the_others(what):
    processes = begin(worker("decode_until", what), JAX_NUM_CPU_DEVICES="1")
    out, err = processes[0].communicate(timeout=200)
    ended = time.time()
    for process in processes:
        process.kill()
        process.communicate()
    last = float(re.findall(r"step 1 (\S+)", out)[0])
    assert processes[0].returncode != 0
    assert ended - last < 40
    assert "step 2" not in out
    if what == "asleep":
        assert re.search(r"qwen-jax: process 0: decoding \(step 3\): process 1 did not come within 5 seconds", err)
    else:
        assert re.search(r"process 1 is lost|tasks are unhealthy [^\n]*\n1\n", err), err


def test_generate_distributed(tmp_path):
    pytest.importorskip("transformers")  # reads the tokenizer
    folder = write_successor(tmp_path / "model", "abcdef")

    def command(coordinator, process):
        options = ["--coordinator", coordinator, "--num-processes", "2", "--process-id", str(process)]
        text = ["-m", "qwen_jax", "generate", str(folder), "abc", "--distributed", *options]
        return [*text, "--temperature", "0", "--max-new-tokens", "3"]

    done = ends(begin(command, JAX_NUM_CPU_DEVICES="1"), 200)
    # Gloo, which CPUs use, writes to the standard output itself.
    printed = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for _, out, _ in done]
    assert ([code for code, *_ in done], printed) == ([0, 0], [["abcdef"], []]), done


@pytest.mark.parametrize("arguments, message", [
    (["--process-id", "1"], "--process-id: goes with --distributed"),
    (["--mesh", "3"], "mesh='3': expected two sizes"),
    (["--distributed"], "distributed: coordinator_address.*Slurm, GKE .*--coordinator HOST:PORT"),
])  # fmt: skip
def test_wrong_options_are_named(arguments, message, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "KUBERNETES", "TPU_"))]:
        monkeypatch.delenv(name)

    def initialize(*arguments, **options):  # as without a cluster; here devices are in use already
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit):
        cli.main(["generate", str(GOLDEN / CASE / "quantized"), "x", *arguments])
    assert re.search(message, capsys.readouterr().err)

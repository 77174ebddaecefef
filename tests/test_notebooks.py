"""The notebooks: short and without functions of their own, outputs no older than the code, and every cell runs."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("nbclient")  # the extra `notebooks`; a GPU machine may have pytest and jax alone
import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from tests import demo_run
from tests.edited import edited
from tests.successor import write_byte_tokenizer

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
RUNNER = ROOT / "scripts" / "notebooks.py"
TINY = "qwen2-int4-per-channel"
LINES, BYTES = 60, 1_000_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(root|home|tmp|work|usr|opt|var|Users|content)/|site-packages|[A-Z]:\\\\")

specification = importlib.util.spec_from_file_location("notebooks_runner", RUNNER)
runner = importlib.util.module_from_spec(specification)
specification.loader.exec_module(runner)


def read(name: str, folder: Path = ROOT / "notebooks") -> nbformat.NotebookNode:
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tree(cell) -> ast.Module:
    return ast.parse(TransformerManager().transform_cell(cell.source))


def problems(notebook) -> list[str]:
    """What a notebook's outputs must not be: missing, failed, of other code, or telling of a machine's folders."""
    found = []
    for number, cell in enumerate(code_cells(notebook)):
        if cell.execution_count != number + 1:
            found.append(f"code cell {number} was not run in its turn")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {number} raised {output.ename}")
            text = output.get("text", "") + "".join(
                value for kind, value in output.get("data", {}).items() if kind.startswith("text/")
            )
            if match := MACHINE_PATH.search(text):
                found.append(f"code cell {number} prints a path: {text[match.start() : match.start() + 60]!r}")
            if "Traceback (most recent call last)" in text:
                found.append(f"code cell {number} prints a traceback")
    if notebook.metadata.get("qwen_jax", {}).get("source_sha256") != runner.source_hash(notebook):
        found.append("the outputs are of other code; run `make notebooks`")
    return found


def test_all_are_there():
    assert {"01_chat", "02_quantize", "03_kv_cache", "04_sharded", "05_kernels"} <= set(NAMES)
    listed = (ROOT / "docs" / "notebooks.md").read_text()
    assert all(f"notebooks/{name}.ipynb" in listed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rules(name):
    notebook = read(name)
    cells = code_cells(notebook)
    nbformat.validate(notebook)
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < BYTES
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    assert not [node for cell in cells for node in ast.walk(tree(cell)) if isinstance(node, functions)]
    lines = [line for cell in cells for line in cell.source.splitlines()]
    assert sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines) <= LINES

    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner_and_name = repository.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{name}.ipynb"
    badge = f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"
    assert badge in notebook.cells[0].source
    install, parameters = cells[:2]
    assert 'find_spec("qwen_jax") is None' in install.source and f"git+{repository}" in install.source
    for node in tree(parameters).body:  # constants alone, for a user to change
        assert isinstance(node, ast.Assign) and ast.literal_eval(node.value) is not None
    assert cells[-1].source.endswith("print_environment()")


@pytest.mark.parametrize("name", NAMES)
def test_outputs(name):
    notebook = read(name)
    assert problems(notebook) == []
    last = code_cells(notebook)[-1].outputs[0].text
    assert all(re.search(rf"^{fact} +\S", last, re.MULTILINE) for fact in ("device", "jax", "python", "date"))
    pictures = [o for c in code_cells(notebook) for o in c.outputs if "image/png" in o.get("data", {})]
    assert pictures or name == "01_chat"


def test_problems_are_found():
    notebook = read("01_chat")
    cells = code_cells(notebook)
    cells[2].source += "\n"
    cells[3].execution_count = None
    cells[4].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]
    cells[5].outputs = [nbformat.v4.new_output("stream", text="see /root/.cache/x")]
    assert len(problems(notebook)) == 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder in floats and one in 4 bits, with a tokenizer and room for the notebooks' texts."""
    folders = {}
    for kind in ("source", "quantized"):
        target = tmp_path_factory.mktemp(kind)
        folders[kind] = edited(TINY, target, kind, config={"max_position_embeddings": 2048})
        write_byte_tokenizer(folders[kind])
    return folders


# Fine-tuning is run by the test of its guide; a notebook of it as well would take CI most of a minute.
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("06")) for n in NAMES])
def test_runs(name, tiny, tmp_path):
    """Every cell, on SmolLM2 where the text is about it, else on tiny models and few shapes: values are a reader's."""
    values = {
        "01_chat": {"MAX_NEW_TOKENS": 40},  # a call of the tool needs 30
        "02_quantize": {"MODEL": str(tiny["source"]), "ROWS": 1, "TOKENS": 600},
        "03_kv_cache": {"MODEL": str(tiny["quantized"]), "BATCHES": (1,), "LENGTHS": (128, 512)},
        "04_sharded": {"MODEL": str(tiny["quantized"])},
    }.get(name, {})
    demo_run.first_run()
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    if name == "04_sharded":
        startup = tmp_path / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        shutil.copy(ROOT / "tests" / "ipython_startup.py", startup)
        environment["IPYTHONDIR"] = str(tmp_path / "ipython")
    if "MODEL" in values:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # there is more to compile than to compute
    command = [sys.executable, str(RUNNER), name, "--output", str(tmp_path)]
    command += [word for key, value in values.items() for word in ("--set", f"{key}={value!r}")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    ran = read(name, tmp_path)
    assert problems(ran) == []
    assert all(f"{key} = {value!r}" in code_cells(ran)[1].source for key, value in values.items())


def test_parameters_are_set_and_others_refused(capsys, monkeypatch):
    notebook = read("02_quantize")
    runner.set_parameters(notebook, {"ROWS": "1"})
    assert code_cells(notebook)[1].source.splitlines()[1] == "ROWS = 1"
    with pytest.raises(ValueError, match="--set names ROW, which .* parameters are not"):
        runner.set_parameters(notebook, {"ROW": "1"})
    monkeypatch.setattr(sys, "argv", ["notebooks.py", "02_quantize", "--set", "ROWS=1"])
    with pytest.raises(SystemExit):
        runner.main()
    assert "give --output" in capsys.readouterr().err


def test_a_cell_that_raises_fails_the_run(tmp_path, monkeypatch, capsys):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0"), nbformat.v4.new_code_cell("2")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebooks.py", "--output", str(tmp_path / "run")])
    assert runner.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

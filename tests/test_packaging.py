"""The built wheel, installed without the source tree: command, import, types, licence, declared dependencies."""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("qwen_jax", "pallas_kernels", "converters")
INT4 = ROOT / "tests" / "golden" / "qwen2-int4-g64-actorder-asym" / "quantized"
BROUGHT_BY = {"jaxlib": "jax", "cycler": "matplotlib"}
# Imported where a command needs it and says how to install it, or only with it installed.
OPTIONAL = {"gguf": "demo", "lm_eval": "eval", "matplotlib": "notebooks", "cycler": "notebooks"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new environment with the wheel in it; the dependencies are this one's, the source tree is out of reach."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", wheel], check=True, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # A bare path: .pth files in it, such as that of the editable installation, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(environment, *command, **options):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    program = [environment / "bin" / command[0], *command[1:]]
    return subprocess.run(program, cwd=environment, env=variables, capture_output=True, text=True, **options)


def test_the_wheel_holds_what_it_should(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(re.fullmatch(r"pallas_kernels/\w+/tuned/.*\.json", name) for name in names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == set(PACKAGES)
    source = {str(path.relative_to(ROOT)) for each in PACKAGES for path in (ROOT / each).rglob("*.py")}
    assert source <= set(names)


def test_the_command_works_and_is_quick(environment):
    code = (
        "import sys, time; start = time.perf_counter(); import qwen_jax; seconds = time.perf_counter() - start\n"
        "from qwen_jax import cli; print(qwen_jax.__file__, seconds, 'jax' in sys.modules)"
    )
    done = run(environment, "python", "-c", code)
    file, seconds, heavy = done.stdout.split()
    assert file.startswith(str(environment)) and float(seconds) < 1.5 and heavy == "False", done
    assert run(environment, "qwen-jax", "--version").stdout.startswith("qwen-jax ")
    done = run(environment, "qwen-jax", "info", INT4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quantization"]["bits"] == 4


def test_the_public_face_is_imported_quickly(environment):
    """Beside JAX and Flax, which it cannot do without: seconds alone would hang on the machine."""

    def seconds(statement: str) -> float:
        code = f"import time; start = time.process_time(); {statement}\nprint(time.process_time() - start)"
        return min(float(run(environment, "python", "-c", code).stdout) for _ in range(2))

    ours, needed = seconds("from qwen_jax import QwenForCausalLM"), seconds("import jax, flax.nnx")
    assert ours < 1.9 * needed, (ours, needed)  # 1.5 as this was written


def test_every_import_is_declared():
    """A clean environment has what pyproject.toml names, and nothing else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return {re.match(r"[\w.-]+", each)[0].lower().replace("-", "_") for each in requirements}

    declared = names(project["dependencies"])
    extras = {extra: names(each) for extra, each in project["optional-dependencies"].items()}
    found = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module.split(".")[0])
    providers = importlib.metadata.packages_distributions()
    for name in sorted(found - set(sys.stdlib_module_names) - set(PACKAGES)):
        distributions = {each.lower().replace("-", "_") for each in providers.get(BROUGHT_BY.get(name, name), [name])}
        allowed = declared | extras.get(OPTIONAL.get(name, ""), set())
        assert distributions & allowed, f"{name} (of {sorted(distributions)}) is imported and not declared"
    assert set(OPTIONAL) <= found, "OPTIONAL names a package that nothing imports"


def test_files_that_a_package_has():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0" in licence
    version = importlib.metadata.version("qwen-jax")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for title in ("Tests", "Adding a family", "Adding a kernel", "Documentation", "Notebooks"):
        assert f"## {title}" in contributing

"""Arrows between packages go one way: the kernels know nothing of the models, the converters nothing of model code."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# package: the modules of ours that it may import (a name stands for itself and all below it)
ALLOWED = {
    "pallas_kernels": {"pallas_kernels"},
    "converters": {
        "converters",
        "qwen_jax.config",
        "qwen_jax.quantization_config",
        "qwen_jax.json_keys",
        "qwen_jax.errors",
        "pallas_kernels",
    },
}
# package: the third-party modules that it may import; None: whatever the project depends on
LIBRARIES = {
    "pallas_kernels": {"jax", "jaxlib", "numpy", "ml_dtypes"},
    "converters": {"jax", "numpy", "ml_dtypes", "safetensors", "orbax", "tensorstore", "etils"},
}
OURS = ("qwen_jax", "pallas_kernels", "converters")


def imported_modules(source: str, package: str) -> set[str]:
    """Full names of all modules that a file of `package` imports, anywhere in it, relative imports resolved.

    For `from a import b` both a and a.b are given when a is one of ours, for b may be a module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            if module in OURS:  # `from qwen_jax import config`: judged by what is taken from it
                found |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                found.add(module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def violations(source: str, package: str) -> set[str]:
    """The imports of a file of `package` (dotted: the folder it lies in) that the package may not have."""
    top = package.split(".")[0]
    bad = set()
    for name in imported_modules(source, package):
        first = name.split(".")[0]
        if first in OURS:
            if not any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED[top]):
                bad.add(name)
        elif first not in LIBRARIES[top] and first not in sys.stdlib_module_names:
            bad.add(name)
    return bad


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no files found under {ROOT / package}"
    bad = {}
    for file in files:
        folder = ".".join(file.relative_to(ROOT).parent.parts)
        if found := violations(file.read_text(), folder):
            bad[str(file.relative_to(ROOT))] = found
    assert not bad


@pytest.mark.parametrize(
    ("source", "package", "bad"),
    [
        ("import qwen_jax", "pallas_kernels.quantized_matmul", {"qwen_jax"}),
        ("def f():\n    from qwen_jax.errors import CheckpointError", "pallas_kernels", {"qwen_jax.errors"}),
        ("import torch, jax.numpy, dataclasses", "pallas_kernels", {"torch"}),
        ("from ..kv_attention import op\nfrom . import layout", "pallas_kernels.quantized_matmul", set()),
        ("from ...qwen_jax import model", "pallas_kernels.quantized_matmul", {"qwen_jax.model"}),
        ("from qwen_jax import config, model", "converters", {"qwen_jax.model"}),
        ("from qwen_jax.config import ModelConfig", "converters", set()),
        ("import importlib\nimportlib.import_module('qwen_jax.linear')", "converters", {"qwen_jax.linear"}),
        ("from qwen_jax.config_reader import x", "converters", {"qwen_jax.config_reader"}),
        ("import flax", "converters", {"flax"}),
    ],
)
def test_the_check_itself_sees_forbidden_imports(source, package, bad):
    assert violations(source, package) == bad

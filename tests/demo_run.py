"""The demo's first start, made once for all tests, with a quarter of its calibration: all of it takes a minute."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
ROWS = 2  # of calibration
MAIN = f"""
from qwen_jax.__main__ import main
from qwen_jax.demo import checkpoints

checkpoints.ROWS = {ROWS}
main()
"""


def folder() -> Path:
    """The cache of the demo that these sources make: others are not found again."""
    digest = hashlib.sha256(MAIN.encode())
    for package in ("qwen_jax/demo", "qwen_jax/quantize", "converters"):
        for file in sorted((ROOT / package).glob("*.py")):
            digest.update(file.read_bytes())
    return ROOT / ".cache" / f"demo-{digest.hexdigest()[:12]}"


def run(*arguments: str) -> tuple[str, str]:
    """Runs `qwen-jax demo` as a user does, but for `ROWS`; (standard output, standard error)."""
    command = [sys.executable, "-c", MAIN, "demo", "--json", *arguments]
    environment = os.environ | {"QWEN_JAX_CACHE": str(folder())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def first_run() -> tuple[str, str]:
    """What the first start in an empty cache printed; `folder()` holds its checkpoints afterwards."""
    folder().parent.mkdir(exist_ok=True)
    record = folder().with_suffix(".json")
    with FileLock(folder().with_suffix(".lock")):
        if not record.exists():
            shutil.rmtree(folder(), ignore_errors=True)  # of a run that was ended halfway
            record.write_text(json.dumps(run()))
        out, said = json.loads(record.read_text())
    return out, said

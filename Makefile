# make demo    download and quantize a small chat model, then answer a question with it (QUESTION="…" for your own)
# make test    lint, type checks and all tests
# make docs    the documentation's site, in site/
# make notebooks    run all notebooks here, and keep their outputs
# Each sets itself up on a fresh machine, and installs again only after pyproject.toml or scripts/setup.sh changed.

VENV ?= .venv
BIN = $(VENV)/bin
QUESTION ?=
export QUESTION
PYTEST ?=

.PHONY: help demo test lint pytest format docs figures notebooks clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.installed-demo
	@$(BIN)/qwen-jax demo $${QUESTION:+"$$QUESTION"}

test: lint pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --threads 2 --pythonpath $(BIN)/python

# PYTEST passes options on: make pytest PYTEST="-k sampling -x -n 0". Two processes, each with whole files of tests,
# in the order that tests/conftest.py gives them.
pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 600 $(PYTEST)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Runs notebooks/ from top to bottom on this machine, and writes them with their outputs.
notebooks: $(VENV)/.installed-test
	$(BIN)/python scripts/notebooks.py

# Strict: a broken link fails. A test builds it, too. To look at it while writing: .venv/bin/mkdocs serve
docs: $(VENV)/.installed-test
	$(BIN)/mkdocs build --strict

# Draws docs/figures anew from benchmarks/results.
figures: $(VENV)/.installed-test
	$(BIN)/python scripts/figures.py

clean:
	rm -rf $(VENV) site .cache .pytest_cache .ruff_cache .hypothesis

# What `test` installs contains what `demo` needs.
$(VENV)/.installed-demo: pyproject.toml scripts/setup.sh
	@if [ -f $(VENV)/.installed-test ] && [ -z "$$(find pyproject.toml scripts/setup.sh -newer $(VENV)/.installed-test)" ]; \
	then touch $@; else sh scripts/setup.sh $(VENV) demo; fi

$(VENV)/.installed-test: pyproject.toml scripts/setup.sh
	@sh scripts/setup.sh $(VENV) test

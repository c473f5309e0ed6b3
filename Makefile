# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-faults bench lint docs clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ARGS ?=
# Evaluated when `train` runs: by then the torch that counts is installed.
NPROC ?= $(shell $(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)')

help:
	@echo 'make train   make $(VENV) and fine-tune the built-in model (NPROC=processes, ARGS="--max-steps 100 ...")'
	@echo 'make test    make $(VENV) and run the test suite (WORKERS=processes, ARGS="tests/quant/test_formats.py ...")'
	@echo 'make test-faults  the tests that cause faults, the long ones too (some 30 minutes)'
	@echo 'make bench   time the kernels, a short form (ARGS="--peers bitsandbytes ..."; see benchmarks/kernels)'
	@echo 'make lint    ruff, mypy, and zizmor for .github/'
	@echo 'make docs    write docs/ from the commands'"'"' options'
	@echo 'make clean   remove caches and build outputs; $(VENV) and output/ stay'

train: $(VENV)/.installed-run
	$(BIN)/qsharded train --ranks $(NPROC) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

test-faults: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=15 --slow tests/faults $(ARGS)

bench: $(VENV)/.installed-run
	$(BIN)/python -m benchmarks.kernels --short $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .github

docs: $(VENV)/.installed-run
	$(BIN)/python -m tools.make_docs

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# One environment, a stamp for each set of extras. What is there already, such as a CPU-only torch, is kept where it
# satisfies constraints.txt.
INSTALL = @echo "installing into $(VENV): $(1) (the first time downloads torch)"; \
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt -e '$(1)' | $(SHOW_LARGE)
# pip says too much or nothing: keep what takes long.
SHOW_LARGE := sed -unE -e 's/^ *((Downloading|Using cached|Processing) .*\([0-9.]+ [MG]B\))$$/  \1/p' \
	-e 's/^(Installing) collected.*/  \1 .../p' -e 's/^(Successfully installed) .*/  \1/p'
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)

$(BIN)/python:
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed-run: $(SOURCES) | $(BIN)/python
	$(call INSTALL,.)
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(call INSTALL,.[test])
	@touch $@ $(VENV)/.installed-run

# mypy sees what the libraries that we fit into declare
COMMA := ,
$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(call INSTALL,.[dev$(COMMA)test])
	@touch $@ $(VENV)/.installed-run $(VENV)/.installed-test

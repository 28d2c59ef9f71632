# Needs make and Python 3.11 or newer. Every target makes .venv first, and again only where a lock file changed.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Warnings and errors only, not a line for every package.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A file whose SHA-256 is not in the lock is refused. Source archives are built with the pinned setuptools. The lock holds
# every dependency, which `pip check` proves; without --no-deps pip would ask for those of torch's CUDA build here.
LOCKED := $(PIP) --require-hashes --no-deps --no-build-isolation --use-pep517 -r
# Torch's CPU build where the index has it and the machine no NVIDIA driver; otherwise the index's usual build.
TORCH_CPU := $(shell sed -n 's/^torch==\([^ ]*\).*/\1+cpu/p' requirements.lock)
CUDA := import sys; from importlib.metadata import requires; sys.exit(not any("cuda" in each for each in requires("torch")))
# The tiny pipeline runs once, on one thread, for all workers.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 15

# DVC runs each stage as `python -m stages.NAME`: that python has to be .venv's, and the core that of this directory.
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help repro test test-slow test-ci test-nightly lint docs audit clean-env

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

repro: $(VENV)/.installed ## run the whole pipeline: fetch, prune, fine-tune, measure
	@$(BIN)/python -m tools.mend_dvc
	$(BIN)/dvc repro
	@$(BIN)/python -m tvaprune results

test: lint ## every check and every fast test
	$(PYTEST)

test-slow: $(VENV)/.installed-dev ## the tests marked slow
	$(PYTEST) -m 'slow and not nightly'

test-ci: lint ## every check, the fast tests and those marked slow, in one run
	$(PYTEST) -m 'not nightly'

test-nightly: $(VENV)/.installed-dev ## the tests marked nightly: hours
	$(PYTEST) -m nightly

lint: $(VENV)/.installed-dev ## style, types and layers alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.installed-dev ## build the documentation into docs/_build, warnings are errors
	$(BIN)/python -m sphinx --builder html --fail-on-warning --nitpicky --keep-going docs docs/_build

audit: $(VENV)/.installed ## ask a public database for vulnerabilities of the pinned packages; needs a network
	$(BIN)/python -m tools.audit

clean-env: ## remove .venv
	rm -rf $(VENV)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1);" \
			"name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make $(VENV); on Debian: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: requirements-build.lock requirements.lock requirements-cuda.lock | $(BIN)/pip
	@echo "installing requirements.lock into $(VENV): some minutes the first time"
	@$(LOCKED) requirements-build.lock
	@: > $(VENV)/torch.txt
	@command -v nvidia-smi >/dev/null || $(BIN)/python -m pip index versions torch 2>/dev/null | \
		grep -owF '$(TORCH_CPU)' | sed 's/^/torch==/' >> $(VENV)/torch.txt
	@$(LOCKED) requirements.lock -c $(VENV)/torch.txt
	@if $(BIN)/python -c '$(CUDA)'; then $(LOCKED) requirements-cuda.lock; fi
	@$(BIN)/python -m pip check
	$(BIN)/python -m tools.plots_page
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@echo "installing requirements-dev.lock into $(VENV)"
	@$(LOCKED) requirements-dev.lock
	@$(BIN)/python -m pip check
	@touch $@

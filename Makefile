# Needs make and Python 3.11 or newer. Every target makes .venv first, and again only where a lock file changed.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Warnings and errors only, not a line for every package.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The tiny pipeline runs once, on one thread, for all workers.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 15

# DVC runs each stage as `python -m stages.NAME`: that python has to be .venv's, and the core that of this directory.
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help repro test test-slow test-nightly lint docs clean-env

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

repro: $(VENV)/.installed ## run the whole pipeline: fetch, prune, fine-tune, measure
	$(BIN)/dvc repro
	@$(BIN)/python -m tvaprune results

test: lint ## every check and every fast test
	$(PYTEST)

test-slow: $(VENV)/.installed-dev ## the tests marked slow
	$(PYTEST) -m 'slow and not nightly'

test-nightly: $(VENV)/.installed-dev ## the tests marked nightly: hours
	$(PYTEST) -m nightly

lint: $(VENV)/.installed-dev ## style, types and layers alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.installed-dev ## build the documentation into docs/_build, warnings are errors
	$(BIN)/python -m sphinx --builder html --fail-on-warning --nitpicky --keep-going docs docs/_build

clean-env: ## remove .venv
	rm -rf $(VENV)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1);" \
			"name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make $(VENV); on Debian: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: requirements.lock | $(BIN)/pip
	@echo "installing requirements.lock into $(VENV): some minutes the first time"
	@$(PIP) -r requirements.lock
	$(BIN)/python -m tools.plots_page
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@echo "installing requirements-dev.lock into $(VENV)"
	@$(PIP) -r requirements-dev.lock
	@touch $@

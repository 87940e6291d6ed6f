# Two commands do all the set-up: `make demo` and `make test`. PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## align the small model and compare it with its rivals (about ten minutes)
	$(BIN)/psa-vlm demo

test: lint ## lint, types and tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## put the code into its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo ## the speed figures of docs/results.md
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/stage1.py

# Each stamp is remade when what it installs from changes.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "psa-vlm needs Python 3.11 or later: make PYTHON=/path/to/it")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch into $(VENV)"
	@$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing psa-vlm into $(VENV)"
	@$(PIP) --editable '.[train,eval]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing the development tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@

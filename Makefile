# Two commands do everything: `make quickstart` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check bench clean

quickstart: .venv/ready  ## The main job on synthetic puppets: minutes on two CPU cores.
	$(BIN)/prioritycut quickstart

test: .venv/ready-dev  ## All tests.
	$(BIN)/python -m pytest

check: .venv/ready-dev  ## Lint, format, types, import layers, hooks.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready  ## Figures with their baselines.
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:  ## Remove the environment and what the quickstart made.
	rm -rf .venv quickstart

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Everything runs in its own virtual environment, .venv, made on first use.
PYTHON ?= python3
# the version the goldens and timings were checked with; `make setup TORCH=torch` takes the newest
TORCH ?= torch==2.13.0
BIN := .venv/bin
OUT ?= bench/results


.PHONY: setup demo test lint check bench gpu clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m tarvis.demo --out demo

test: setup
	$(BIN)/python -m pytest -q

check: lint test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

gpu:
	$(PYTHON) -m bench.gpu --out "$(OUT)"

clean:
	rm -rf .venv demo out .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis

# Everything runs in its own virtual environment, .venv, made on first use.
PYTHON ?= python3
# the version the goldens and timings were checked with; `make setup TORCH=torch` takes the newest
TORCH ?= torch==2.13.0
BIN := .venv/bin
OUT ?= bench/results


.PHONY: setup setup-web demo test test-slow test-all fuzz test-triton36 lint check bench gpu clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "trackeval>=1.3"
	touch $@

# a browser for the tests of the page (Debian and Ubuntu; asks for the rights to install)
setup-web: setup
	apt-get install -y --no-install-recommends chromium

demo: setup
	$(BIN)/python -m tarvis.demo --out demo

# as many at once as there are cores, a thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

# what a change can break, in minutes
test: setup
	$(PYTEST) -m "not slow"

# the rest: machine code for all architectures, engine builds, thousands of frames, more cases, the other Triton
test-slow: setup test-triton36
	$(PYTEST) -m slow

# thousands of damaged files of every kind; make fuzz SEED=1 for others
fuzz: setup
	$(PYTEST) tests/fuzz -m slow --fuzz-cases $(or $(CASES),2000) --fuzz-seed $(or $(SEED),0)

# one after the other, also under make -j
test-all:
	$(MAKE) test
	$(MAKE) test-slow

check: lint test

# the kernels once more with the oldest Triton that is supported (its interpreter needs NumPy < 2.4)
test-triton36: .venv36/installed
	OMP_NUM_THREADS=1 .venv36/bin/python -m pytest -q -n auto --dist worksteal tests/kernels

.venv36/installed: pyproject.toml
	$(PYTHON) -m venv .venv36
	.venv36/bin/python -m pip install --quiet --upgrade pip
	.venv36/bin/python -m pip install --quiet "$(TORCH)"
	.venv36/bin/python -m pip install --quiet "triton==3.6.0" "numpy<2.4" --editable ".[dev]"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

# with a Python that has torch for this machine's GPU, not .venv
gpu:
	$(PYTHON) -m bench.gpu --out "$(OUT)"

clean:
	rm -rf .venv .venv36 demo .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis

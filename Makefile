# Everything runs in .venv; a stamp newer than pyproject.toml means "already installed".
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo check test lint emulate bench gpu clean

# The first interpreter on the path that is new enough.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

demo: .venv/.train
	$(BIN)/python -m reprune_triton.bench demo

# A minute on two cores: the tests that neither compile nor interpret kernels, but for the slowest.
QUICK := selection/test_definition selection/test_ops_errors selection/test_pool selection/test_regrow \
    selection/test_widths fused/test_dispatch running/test_chains running/test_channels running/test_copies \
    running/test_interrupts running/test_layers running/test_optimizers bench/test_bench_report bench/test_bench_rows \
    test_checked test_guard test_readme test_rooms
check: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 tests/training $(QUICK:%=tests/%.py)

# Which tests stay together in one process: tests/conftest.py.
test: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadscope

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

# Compiled kernels, executed on the CPU (tests/ptxemu): make emulate ARCHS=90 SEEDS='1 2 3' ARGS='--inexact'
ARCHS ?= 80 90
SEEDS ?= 0
emulate: .venv/.test
	set -e; for arch in $(ARCHS); do for seed in $(SEEDS); do \
	    $(BIN)/python -m pytest -q -n auto --maxprocesses 8 tests --emulate $$arch --seed $$seed $(ARGS); done; done

# Ratios to other libraries, guarded: make bench ARGS='--json bench/results/suites.jsonl'
bench: .venv/.test
	$(BIN)/python -m pytest -q bench/suites --benchmark-columns=median,iqr,rounds $(ARGS)

# On a machine with a GPU, from a bare checkout: nothing is installed.
GPU_PYTHON ?= python3
gpu:
	@test -n "$(OUT)" || { echo "usage: make gpu OUT=DIR [ARGS='--first --minutes 9 --commit HASH']"; exit 1; }
	PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) -m reprune_triton.bench gpu --out "$(OUT)" $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/.%: pyproject.toml .venv/.python
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	touch $@

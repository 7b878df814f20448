# Everything runs from a fresh clone with only Python 3.11+ and make.  PYTHON=python3.12 picks the interpreter, DEVICE=gpu the CUDA packages.
PY := .venv/bin/python
SEED ?= 1
export PYTHON DEVICE

.PHONY: help setup test soak gpu-test lint audit bench docs quickstart clean

help:
	@echo "make setup       .venv with everything (PYTHON=python3.12, DEVICE=gpu)"
	@echo "make test        every test that needs no GPU"
	@echo "make soak        runs, data, conversions and rewards broken again and again, with a summary table"
	@echo "make gpu-test    the tests that need a GPU, under ten minutes on one; GPUS=8: those that need eight"
	@echo "make lint        ruff, mypy, what make audit does, and whether the [gpu] packages have wheels"
	@echo "make audit       known advisories of the installed packages (asks an index about each)"
	@echo "make quickstart  corpus -> pretrain -> SFT -> RM -> PPO -> HF export -> report, on the CPU (SEED=1)"
	@echo "make bench       every benchmarks/*.py but gpu_first_hour.py"
	@echo "make docs        docs/metrics.md and docs/configuration.md from the code"
	@echo "make clean       caches and build output (not .venv, not runs/)"

setup:
	@sh scripts/setup.sh

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

soak: setup
	$(PY) scripts/soak.py

# Looks for a GPU before it makes a .venv of CUDA packages. PY=python3 takes another environment than .venv.
gpu-test:
	@ls -d /dev/nvidia[0-9]* /dev/dxg /dev/kfd 2>/dev/null | grep -q . || { echo \
		"gpu-test: no GPU on this machine (no /dev/nvidia0); make test runs the same tests on the CPU, smaller" >&2; exit 1; }
	@if [ "$(PY)" = .venv/bin/python ]; then DEVICE=gpu sh scripts/setup.sh; fi
	MRLHF_DEVICE=cuda $(PY) -m pytest -q -m $(if $(filter 8,$(GPUS)),gpu8,gpu) tests/gpu

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) scripts/audit.py
	$(PY) scripts/resolve_gpu.py

audit: setup
	$(PY) scripts/audit.py

bench: setup
	@set -e; for script in $(filter-out benchmarks/gpu_first_hour.py, $(wildcard benchmarks/*.py)); do \
		if [ -e "$$script" ]; then echo "$(PY) $$script"; $(PY) "$$script"; fi; \
	done

docs: setup
	$(PY) docs/generate.py

quickstart: setup
	$(PY) examples/quickstart/run.py --seed $(SEED)

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

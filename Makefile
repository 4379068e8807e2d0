# Every recipe is one script in scripts/, so that all of it works without make too.
# PYTHON=/path/to/python chooses the interpreter that .venv is built from.

MODEL ?= $(firstword $(wildcard data/*.gguf))
BENCH_ARGS ?= -p 64 -n 32 -r 3 -o md

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint oracle cuda-gates gpu-check notebooks bench clean

help: ## this list
	@echo "make TARGET; each one sets up .venv by itself when it has to:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

demo: ## a trained MoE model talks with 25% of its experts resident
	@sh scripts/demo.sh

test: ## ruff, mypy, pytest, notebooks: at most eight minutes of two cores
	@sh scripts/test.sh

test-all: ## the same with the slow tests: about an hour and a half of one core
	@sh scripts/test.sh --all

lint: ## ruff and mypy only
	@sh scripts/test.sh --lint

oracle: ## the reference against llama.cpp and transformers, file by file; writes the table of docs/results.md
	@sh scripts/bootstrap.sh base
	@OPENBLAS_NUM_THREADS=1 .venv/bin/python benchmarks/oracle.py --write docs/results.md $(ORACLE_ARGS)

cuda-gates: ## compile the CUDA kernels for seven architectures, no GPU needed; compares docs/kernels.md
	@sh scripts/cuda_gates.sh --all

gpu-check: ## on a machine with a GPU: kernels, models, copies, rates; writes gpu-check.json and .md, under 8 minutes
	@sh scripts/gpu_check.sh $(GPU_CHECK_ARGS)

notebooks: ## open the course in JupyterLab
	@sh scripts/notebooks.sh

bench: ## tokens per second of MODEL (BENCH_ARGS: see moe-cupy bench --help)
	@sh scripts/bootstrap.sh base
	@.venv/bin/python -m moe_cupy bench -m "$(MODEL)" $(BENCH_ARGS)

clean: ## remove caches and build leftovers (the environment goes with: rm -r .venv)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name .venv -prune -o -name .git -prune -o \
	  \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

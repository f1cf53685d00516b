# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs, once.
BIN := .venv/bin
OUT ?= runs/demo

.PHONY: setup demo test gpu docs faults check fix clean help
help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

setup: ## virtual environment, MLX for this machine, OpenBLAS, the demo's teacher
	@tools/setup.sh

demo: setup ## distil a real model in a few minutes, without a network
	$(BIN)/pmetal-pipeline demo --out $(OUT) --overwrite

test: setup ## the whole test suite
	$(BIN)/python -m pytest -q

gpu: setup ## check everything on this machine's GPU, with the real model: a table of PASS and FAIL
	$(BIN)/python benchmarks/gpu.py --out runs/gpu

docs: setup ## write the pages that are made out of the code
	$(BIN)/python -m tools.reference
	$(BIN)/python -m tools.tree

faults: setup ## the long form of the fault-injection tests
	$(BIN)/python -m pytest -q -m faults

check: setup ## formatting, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: setup ## apply formatting and safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the virtual environment and build leftovers
	rm -rf .venv build dist *.egg-info

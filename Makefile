# `make test` and `make demo` are complete on a fresh machine: they first make a virtual environment.
# VENV=DIR takes another place for it, PYTHON=NAME another interpreter.
VENV ?= .venv
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --no-input --disable-pip-version-check
FRESH := build/constraints

.DEFAULT_GOAL := help
.PHONY: help demo test lint types drills gpu bench constraints clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(VENV)/installed ## Build the world, a reward model and a grid over w and k, and report on it, in demo/
	$(BIN)/mmrlhf demo --out demo

test: $(VENV)/installed ## Run the tests that take seconds
	$(BIN)/pytest -m "not slow" -n 2

drills: $(VENV)/installed ## Run the tests that take minutes, and print what they measure
	$(BIN)/pytest -m slow -s --timeout 1800

gpu: $(VENV)/installed ## Run the tests and the bench that need a GPU
	$(BIN)/pytest -m gpu -s --timeout 1800
	$(BIN)/python bench/gpu.py --out gpu.json

bench: $(VENV)/installed ## Measure steps, critiques, reading and the wait of a training, each against others
	$(BIN)/python bench/dpo_step.py
	$(BIN)/python bench/reward.py
	$(BIN)/python bench/reader.py
	$(BIN)/python bench/reader.py --many 1000000
	$(BIN)/python bench/wait.py

lint: $(VENV)/installed ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed ## Check types
	$(BIN)/mypy

constraints: ## Rewrite constraints.txt from the newest versions that pyproject.toml allows
	rm -rf $(FRESH)
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python $(PIP_INSTALL) -e '.[dev]'
	$(FRESH)/bin/python dev/constraints.py > $(FRESH)/constraints.txt
	mv $(FRESH)/constraints.txt constraints.txt
	rm -rf $(FRESH)

clean: ## Remove what can be made again, but for the virtual environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo
	find src tests dev bench -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

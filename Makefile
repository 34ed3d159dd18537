# make demo        make the tiny model, train it, draw its figures and its page
# make test        run the tests, two at a time
# make test-slow   run the slow tests: fifty kills, four ranks, two hosts; about twenty minutes
# make lint        check the code with ruff
# make install     make the virtual environment .venv (the commands above do so when it is missing)
# make clean       remove the environment, the caches and all runs
# Options: ENGINE=vllm|transformers  SEED=0  RUN=demo  TORCH_INDEX=address  UV=

PYTHON ?= python3
ENGINE ?= auto
SEED ?= 0
RUN ?= demo
BIN := .venv/bin
SYSTEM := $(shell uname)
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
REQUIREMENTS := $(if $(GPU),pyproject.toml,tools/requirements-cpu.txt)
TORCH := $(shell grep -o 'torch==[^"]*' pyproject.toml)
# On the package index, torch for Linux is the CUDA build: gigabytes that a CPU has no use for.
# TORCH_INDEX names another index for torch: the address of PyTorch's index of CPU builds, which its
# installation page gives.
TORCH_INDEX ?=
# uv installs several times faster. UV= leaves it out: it does not know pip's configuration.
UV ?= $(shell command -v uv 2>/dev/null)
VENV := $(if $(UV),$(UV) venv -q --allow-existing --python $(PYTHON),$(PYTHON) -m venv)
# Modules are compiled when they are first imported: most never are.
PIP := $(if $(UV),$(UV) pip install --python $(BIN)/python,\
    $(BIN)/pip install --no-compile --disable-pip-version-check)
STAGE := @$(PYTHON) tools/progress.py
STAGES := $(if $(GPU),4,$(if $(filter Linux,$(SYSTEM)),5,4))
# The tests are many and small: with more threads they wait for each other.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.PHONY: demo test test-slow lint install clean
demo: install
	$(BIN)/python train.py --name $(RUN) --overwrite --engine $(ENGINE) --seed $(SEED)

test: install
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: install
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow -s --timeout 3600 $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/installed
.venv/installed: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and \
	    "Python 3.11 or newer is needed; pass PYTHON=/path/to/python3.11")'
	$(STAGE) '1/$(STAGES) virtual environment .venv, with $(if $(UV),uv,pip)' $(VENV) .venv
ifneq ($(GPU),)
	$(STAGE) '2/$(STAGES) torch, vLLM and the other packages: several GB' $(PIP) '.[vllm,test]'
else ifeq ($(SYSTEM),Linux)
	$(STAGE) '2/$(STAGES) $(TORCH): 0.2 GB, or several if it is the CUDA build' \
	    $(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) $(TORCH)
	$(STAGE) '3/$(STAGES) the other $(shell grep -c '^[a-z].*==' $(REQUIREMENTS)) packages: 0.4 GB' \
	    $(PIP) --no-deps --only-binary :all: -r tools/requirements-cpu.txt
else # vLLM's CPU build is for Linux only
	$(STAGE) '2/$(STAGES) torch and the other packages: 0.5 GB' $(PIP) '.[test]'
endif
	$(STAGE) '$(shell expr $(STAGES) - 1)/$(STAGES) the first import, which compiles modules' \
	    $(BIN)/python -c 'import train'
	$(STAGE) '$(STAGES)/$(STAGES) vLLM, which may be missing' $(BIN)/python -c 'import vllm' 2>/dev/null || \
	    echo '     ENGINE=transformers works without it'
	@touch $@

clean:
	rm -rf .venv .cache runs

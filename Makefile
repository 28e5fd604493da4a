# `make demo` and `make test` set everything up themselves: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test soak lint bench docs example-smollm2 help

help:  ## Say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	@echo "installing the packages of constraints.txt into $(VENV): minutes, and 3.4 GB with the CPU build of torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## Train a small model 3D-parallel, resume it on another layout, export it
	$(BIN)/python examples/demo/run.py

test: $(VENV)/installed  ## Run the tests that need no GPU
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

example-smollm2: $(VENV)/installed  ## A real model end to end: SmolLM2-135M imported, evaluated, trained on, exported, quantized
	$(BIN)/python examples/smollm2/run.py

soak: $(VENV)/installed  ## Train under random kills for minutes, and run the long tests
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python -m pytest -m soak
	$(BIN)/python kernels/benchmarks/other_triton.py

lint: $(VENV)/installed  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --error-on-warning --python $(VENV)

bench: $(VENV)/installed  ## Compare a CPU training step with transformers'
	$(BIN)/python benchmarks/cpu_step.py

docs: $(VENV)/installed  ## Build the documentation as a site in site/
	$(BIN)/python docs/drawings.py
	$(BIN)/python -m mkdocs build --strict

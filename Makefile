# Everything on a fresh machine from one command; the virtual environment is made on first use.
#   make demo   decompose, fine-tune and export the built-in tiny model
#   make test   format, lint, types, tests
#
# With an NVIDIA GPU the newest torch is installed, which brings CUDA. Without one, the release that the suite is run
# with: on macOS, Windows and Arm a CPU build. On x86 Linux the default package index has CUDA builds only, which run
# on a CPU, too; to save their gigabytes name PyTorch's CPU index (see pytorch.org): make demo TORCH_INDEX=URL

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch,torch==2.13.0)
TORCH_INDEX ?=
# One process a core: the tests' tensors are too small to share, and threads that share one wait for one another.
PYTEST_ARGS ?= -n auto

.PHONY: demo test lint format install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "qosora needs Python 3.11 or newer, this is " + sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/qosora demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Everything on a fresh machine from one command; the virtual environment is made on first use.
#   make demo         decompose, fine-tune and export the built-in tiny model
#   make test         format, lint, types, tests: all that CI runs
#   make coverage     the tests again, and what of the code they reach: takes half as long again
#   make test-fast    the tests without the slow ones, while editing
#   make campaign     damage every file that a command reads, interrupt every command that writes, and judge the ends
#   make test-newest  the tests with the newest release of every dependency, in an environment of its own
#   make lock         write requirements.lock anew; LOCK_ARGS=--upgrade moves it to newer versions
#
# What is installed is what requirements.lock says, to the version, on every system, with a GPU and without. On Linux
# the default package index has torch with CUDA, which runs on a CPU, too. To save its gigabytes, or for another CUDA,
# name an index of PyTorch's (see pytorch.org): make demo TORCH_INDEX=URL. Another torch: make demo TORCH=torch==VERSION.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
LOCK_ARGS ?=
TORCH ?=
TORCH_INDEX ?=
# One process a core: the tests' tensors are too small to share, and threads that share one wait for one another.
PYTEST_ARGS ?= -n auto --dist worksteal

# Where both indexes have a version PyTorch's is taken, as 2.13.0+cpu counts as newer than 2.13.0.
PIP_INSTALL := python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# What comes in versions of its own with a torch that is not the lock's, and with one for another CUDA.
UNLOCKED := nothing$(if $(TORCH),|torch|triton)$(if $(TORCH)$(TORCH_INDEX),|cuda-.*|nvidia-.*)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: install demo lint format test coverage test-fast campaign test-newest lock clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "qosora needs Python 3.11 or newer, this is " + sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)
	grep -vE '^($(UNLOCKED))==' $(LOCK) > $(VENV)/constraints.txt
	$(BIN)/$(PIP_INSTALL) --constraint $(VENV)/constraints.txt --upgrade pip setuptools
	$(BIN)/$(PIP_INSTALL) --constraint $(VENV)/constraints.txt --no-build-isolation $(if $(TORCH),'$(TORCH)') --editable '.[dev]'
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
	$(PYTEST) $(PYTEST_ARGS)

coverage: install
	$(PYTEST) --cov=qosora $(PYTEST_ARGS)

test-fast: install
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

campaign: install
	$(BIN)/python -W ignore tests/campaign/corruption.py --count 2400 --seconds 840
	$(BIN)/python -W ignore tests/campaign/interruptions.py --count 252 --seconds 1200

# The requirements of pyproject.toml without their versions, upper bounds included.
test-newest: BIN := $(VENV)-newest/bin
test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(BIN)/python -c 'import re, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    groups = [project["dependencies"], *project["optional-dependencies"].values()]; \
	    print(*(re.sub(r"^([\w-]+)[^;]*", r"\1", each) for group in groups for each in group if "qosora[" not in each), sep="\n")' \
	    > $(VENV)-newest/requirements.txt
	$(BIN)/$(PIP_INSTALL) --upgrade --upgrade-strategy eager pip setuptools -r $(VENV)-newest/requirements.txt
	$(BIN)/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip list
	$(PYTEST) $(PYTEST_ARGS)

# For all systems and Python versions at once. Only here is torch's version chosen; pip is in it because it installs.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --upgrade uv
	printf 'torch==2.13.0\npip\n' | $(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 \
	    --fork-strategy fewest --all-extras --annotation-style line --custom-compile-command 'make lock' \
	    $(LOCK_ARGS) --output-file $(LOCK) pyproject.toml -

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lock build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*

"""One seed for all tests, hypothesis profiles, and the condition of the `gpu` marker.

`pytest --seed N` (or QOSORA_TEST_SEED=N) runs the tests on other random numbers; without it every run is the same.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from outsiders import Outsiders
from training_runs import place, run  # noqa: F401  (fixtures)

SEED_VARIABLE = "QOSORA_TEST_SEED"


def pytest_addoption(parser: pytest.Parser) -> None:
    default = os.environ.get(SEED_VARIABLE)
    parser.addoption(
        "--seed", type=int, default=None if default is None else int(default), help="seed of the tests (default: 0)"
    )


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--seed")
    hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
    hypothesis.settings.register_profile("seeded", deadline=None, derandomize=False, database=None, print_blob=True)
    hypothesis.settings.load_profile("fixed" if seed is None else "seeded")
    if seed is not None and config.getoption("--hypothesis-seed", None) is None:
        hypothesis.core.global_force_seed = seed
    # The tensors here are small: more threads cost more than they bring, and xdist brings its own processes.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remember verified files in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _outsiders() -> Iterator[None]:
    """Verify exports in forks of one process, which takes no seconds to begin."""
    if not hasattr(os, "fork"):
        yield
        return
    outsiders = Outsiders()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess, "run", outsiders)
        yield
    outsiders.end()


@pytest.fixture
def process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify exports as users do."""
    if isinstance(subprocess.run, Outsiders):
        monkeypatch.setattr(subprocess, "run", subprocess.run.plain)


def pytest_report_header(config: pytest.Config) -> str:
    return f"qosora: seed {config.getoption('--seed') or 0}, {torch.get_num_threads()} torch threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch.cuda.is_available() is False"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed, for generators of a test's own."""
    return int(request.config.getoption("--seed") or 0)


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.fixture
def float32_sums() -> Iterator[None]:
    """cuBLAS adds in float32, which by default it may split and round."""
    matmul = torch.backends.cuda.matmul
    options = {
        "allow_bf16_reduced_precision_reduction": False,
        "allow_fp16_reduced_precision_reduction": False,
        "fp32_precision": "ieee",
    }
    before = {name: getattr(matmul, name) for name in options}
    for name, value in options.items():
        setattr(matmul, name, value)
    yield
    for name, value in before.items():
        setattr(matmul, name, value)


@pytest.fixture(autouse=True, scope="module")
def _process_as_it_was() -> Iterator[None]:
    """Undo what the command line does to its process: messages, and variables that child processes would inherit."""
    logger = logging.getLogger("qosora")
    handlers, level, propagate, environ = list(logger.handlers), logger.level, logger.propagate, dict(os.environ)
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    os.environ.update(environ)

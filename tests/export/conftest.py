"""A base with its original and an adapter, made once for all tests of exports."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import Trained, make_trained


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("exports") / "tiny", "llama-tied")


@pytest.fixture
def copies(tiny: Trained, tmp_path: Path) -> Trained:
    """The same, to be damaged."""
    shutil.copytree(tiny.base, tmp_path / "base")
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    return tiny._replace(base=tmp_path / "base", adapter=tmp_path / "adapter")

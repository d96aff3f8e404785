"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """An output folder that must not appear."""
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists()

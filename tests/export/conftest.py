"""A base with its original and an adapter, made once for all tests of exports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Trained, make_trained

from qosora.errors import first_line
from qosora.export import outsider


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("exports") / "tiny", "llama-tied")


@pytest.fixture
def copies(tiny: Trained, tmp_path: Path) -> Trained:
    """The same, to be damaged."""
    shutil.copytree(tiny.base, tmp_path / "base")
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    return tiny._replace(base=tmp_path / "base", adapter=tmp_path / "adapter")


@pytest.fixture
def outsider_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the program that verifies exports in this process, which has imported what it needs: in a tenth of the time.

    That it runs where qosora cannot be imported is for the tests that start it: of test_outsider.py and test_verify.py.
    """

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-I", outsider.__file__]
        finders = list(sys.meta_path)
        monkeypatch.setattr(sys, "argv", command[2:])
        problem: str | None = None
        try:
            outsider.main()
        except SystemExit as error:
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
        sys.meta_path[:] = finders
        return subprocess.CompletedProcess(command, int(problem is not None), "", problem or "")

    monkeypatch.setattr("qosora.export.verify.subprocess", SimpleNamespace(run=run))

"""A sample of the campaign: `make campaign` has the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forked processes")
def test_damaged_files_end_rightly(request: pytest.FixtureRequest):
    script = Path(__file__).parent / "corruption.py"
    seed = request.config.getoption("--seed") or 0
    argv = [sys.executable, "-W", "ignore", str(script), "--count", "80", "--seconds", "300", "--seed", str(seed)]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 0, [line for line in run.stderr.splitlines() if line.startswith("{")]
    assert json.loads(run.stdout)["tried"] == 80

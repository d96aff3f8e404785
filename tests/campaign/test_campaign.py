"""Samples of the campaigns: `make campaign` has the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forked processes"),
]


@pytest.mark.parametrize(("script", "count"), [("corruption.py", 80), ("interruptions.py", 14)])
def test_commands_end_rightly(script: str, count: int, request: pytest.FixtureRequest):
    file, seed = Path(__file__).parent / script, request.config.getoption("--seed") or 0
    argv = [sys.executable, "-W", "ignore", str(file), "--count", str(count), "--seconds", "300", "--seed", str(seed)]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 0, [line for line in run.stderr.splitlines() if line.startswith("{")]
    assert json.loads(run.stdout)["tried"] == count

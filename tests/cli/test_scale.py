"""`qosora quantize --scale`, and what inspects and plans its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_checkpoint

from qosora.cli import main


def test_quantize_inspect_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, base = make_checkpoint(tmp_path / "source"), tmp_path / "base"
    assert main(["quantize", str(source), str(base), "--rank", "8", "--scale", "columns", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]
    assert main(["inspect", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["scale"] == "columns"
    assert main(["plan", str(base), "--seq-len", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 8

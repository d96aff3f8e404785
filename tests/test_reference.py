"""docs/reference.md is what the code says, and has all of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import qosora

FOLDER = Path(__file__).parent.parent / "docs"


def test_the_reference_is_current_and_whole():
    spec = importlib.util.spec_from_file_location("make_reference", FOLDER / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (FOLDER / "reference.md").read_text(encoding="utf-8")
    assert written == script.text(), "python docs/make_reference.py writes it anew"
    for name in set(qosora.__all__) - {"__version__"}:
        assert f"\n### {name}\n" in written
    assert "\n### qosora train\n" in written
    assert "`--batch-size N\\|auto`" in written

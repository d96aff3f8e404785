"""A folder is read once, and again when a file of it, or what reads it, is another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import make_checkpoint

from qosora import quantize, remembered
from qosora.base import describe
from qosora.base.inspected import inspected
from qosora.errors import CheckpointError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The folders that were read in full."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders: list[Path] = []
    plain = describe.describe

    def recorded(folder: Path) -> dict[str, Any]:
        folders.append(folder)
        return plain(folder)

    monkeypatch.setattr(describe, "describe", recorded)
    return folders


def test_the_second_time_it_is_told_from_memory(base: Path, read: list[Path]):
    first = inspected(base)
    assert first == describe.describe(base)
    assert len(read) == 2
    assert inspected(str(base)) == first
    assert len(read) == 2


def test_and_by_the_name_that_was_given(base: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch):
    inspected(base)
    monkeypatch.chdir(base.parent)
    assert inspected("base")["folder"] == "base"
    assert len(read) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "qosora_manifest.json"])
def test_a_file_that_has_changed_is_read(base: Path, read: list[Path], name: str):
    inspected(base)
    data = bytearray((base / name).read_bytes())
    data[-5] ^= 1
    (base / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        inspected(base)
    assert len(read) == 2
    with pytest.raises(CheckpointError):  # a refusal is not remembered
        inspected(base)


def test_a_file_that_is_gone(base: Path, read: list[Path]):
    inspected(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        inspected(base)


def test_other_code_reads_anew(base: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch):
    inspected(base)
    monkeypatch.setattr(remembered, "_own_code", lambda: ["changed"])
    inspected(base)
    assert len(read) == 2


def test_damaged_memory_is_none(base: Path, read: list[Path], tmp_path: Path):
    found = inspected(base)
    for file in (tmp_path / "cache").rglob("inspected/*.json"):
        file.write_text('{"state": 1, "found": []}')
    assert inspected(base) == found
    assert len(read) == 2


def test_telling_loads_no_torch(base: Path, read: list[Path]):
    inspected(base)
    code = (
        "import sys; from qosora.cli import main; main(['inspect', sys.argv[1]]); "
        "print({'torch', 'transformers', 'peft'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True, check=True).stdout
    assert out.endswith("set()\n"), out

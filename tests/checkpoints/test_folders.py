"""Folders: what may be replaced, what is carried along, what is downloaded."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from qosora.checkpoints import folders
from qosora.checkpoints.folders import check_target, copy_files, local_folder, read_json, require_space
from qosora.errors import CheckpointError


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', b"\xff"])
def test_damaged_json(tmp_path: Path, text: str | bytes):
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        read_json(file)


def make_old(target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text("old")


def test_what_may_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_old(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    for name in ("nothing", "empty"):
        check_target(tmp_path / name, overwrite=False)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        check_target(tmp_path / "model", overwrite=False)
    check_target(tmp_path / "model", overwrite=True)
    with pytest.raises(CheckpointError, match=r"holds 'thesis.tex' and no model"):
        check_target(tmp_path / "home", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        check_target(tmp_path / "home" / "thesis.tex", overwrite=True)
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(CheckpointError, match="the current folder"):
        check_target(tmp_path / "model", overwrite=True)


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**33, 2**32, 2**32))
    require_space(tmp_path / "new" / "model", 2**32)
    with pytest.raises(CheckpointError, match=r"needs 5.00 GiB, but 4.00 GiB are free"):
        require_space(tmp_path / "new" / "model", 5 * 2**30)


@pytest.mark.parametrize(("present", "downloads"), [("model-00001-of-00002.safetensors", 1), ("README.md", 2)])
def test_pickled_weights_are_downloaded_only_without_safetensors(
    present: str, downloads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / present).touch()
    patterns: list[list[str]] = []

    def download(source: str, *, allow_patterns: list[str], **_: Any) -> str:
        patterns.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(folders, "snapshot_download", download)
    assert local_folder("owner/model", with_pickled=True) == tmp_path
    assert ["pytorch_model*.bin" in each for each in patterns] == [False, True][:downloads]
    local_folder("owner/model")
    assert "pytorch_model*.bin" not in patterns[-1]


def test_code_is_carried_only_where_it_is_trusted(tmp_path: Path):
    for name in ("base", "trusted", "untrusted"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "modeling_tiny.py").touch()
    (tmp_path / "base" / "tokenizer_tiny.py").touch()
    copy_files(tmp_path / "untrusted", tmp_path / "base", None, with_code=False)
    copy_files(tmp_path / "trusted", tmp_path / "base", None, with_code=True)
    assert not list((tmp_path / "untrusted").iterdir())
    assert sorted(f.name for f in (tmp_path / "trusted").iterdir()) == ["modeling_tiny.py", "tokenizer_tiny.py"]

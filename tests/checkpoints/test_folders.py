"""Folders: what may be replaced, who is at work there, what is written whole, carried along and downloaded."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import filelock
import pytest

from qosora.checkpoints import folders
from qosora.checkpoints.folders import (
    check_target,
    copy_files,
    local_folder,
    locked,
    read_json,
    require_space,
    tokenizer_folder,
    write_atomically,
)
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


def test_a_sentencepiece_model_beside_the_tokenizer_of_the_base(tmp_path: Path):
    """What transformers saves with an adapter leaves it out, and other programs read nothing else."""
    for name in ("base", "adapter", "with", "without"):
        (tmp_path / name).mkdir()
    for name in ("base/tokenizer.json", "base/tokenizer.model", "base/merges.txt", "adapter/tokenizer.json"):
        (tmp_path / name).write_text(name)
    copy_files(tmp_path / "with", tmp_path / "base", tmp_path / "adapter", with_code=False)
    copied = {f.name: f.read_text() for f in (tmp_path / "with").iterdir()}
    assert copied == {"tokenizer.json": "adapter/tokenizer.json", "tokenizer.model": "base/tokenizer.model"}
    (tmp_path / "adapter" / "tokenizer.model").write_text("own")
    copy_files(tmp_path / "without", tmp_path / "base", tmp_path / "adapter", with_code=False)
    assert (tmp_path / "without" / "tokenizer.model").read_text() == "own"


#: Locks a folder, says so, and stays until it is told to end.
HOLD = """
import sys
from pathlib import Path
from qosora.checkpoints.folders import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def holding(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def refused(folder: Path) -> None:
    message = r"out\.partial: another process is at work there; wait for it, or end it"
    with pytest.raises(CheckpointError, match=message), locked(folder):
        pass


def test_another_process_is_refused_until_the_first_is_done(tmp_path: Path):
    folder = tmp_path / "out.partial"
    with holding(folder) as process:
        refused(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial.lock"]
        process.communicate("\n")
    assert list(tmp_path.iterdir()) == []
    with locked(folder):
        refused(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
def test_a_process_that_was_killed_holds_nothing(tmp_path: Path):
    folder = tmp_path / "out.partial"
    with holding(folder) as process:
        process.kill()
    with locked(folder):
        refused(folder)
    assert list(tmp_path.iterdir()) == []


def test_an_error_unlocks(tmp_path: Path):
    folder = tmp_path / "out.partial"
    with pytest.raises(OSError, match="full"), locked(folder):
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


def test_goes_on_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: filelock.FileLock) -> None:
        Path(self.lock_file).touch()
        raise OSError("no locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", fail)
    with locked(tmp_path / "out.partial"), locked(tmp_path / "out.partial"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_atomically(tmp_path / "file", "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    write_atomically(tmp_path / "file", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "new"}


def test_the_first_folder_with_a_tokenizer(tmp_path: Path):
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "tokenizer.json").touch()
    assert tokenizer_folder(None, tmp_path, tmp_path / "with") == tmp_path / "with"
    assert tokenizer_folder(None, tmp_path) is None

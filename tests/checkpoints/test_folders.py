"""Folders: who is at work there, and files that are written whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from qosora.checkpoints.folders import locked, tokenizer_folder, write_atomically
from qosora.errors import CheckpointError

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

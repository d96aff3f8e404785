"""A folder in the making: what is finished survives, and nothing half-made is ever taken for whole."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qosora.checkpoints.folders import read_json
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.checkpoints.shards import StoredSpec
from qosora.checkpoints.unfinished import UnfinishedFolder
from qosora.errors import CheckpointError, ConfigError

UNITS = {
    "first": {"a": StoredSpec(torch.float32, (5,)), "b": StoredSpec(torch.uint8, (3,))},
    "second": {"c": StoredSpec(torch.bfloat16, (2, 2))},
}
TENSORS = {"first": {"a": torch.arange(5.0), "b": torch.arange(3).byte()}, "second": {"c": torch.ones(2, 2).bfloat16()}}
STAMPS = {name: [["file", 1, 2]] for name in UNITS}


def folder_at(tmp_path: Path, **job: Any) -> UnfinishedFolder:
    return UnfinishedFolder(tmp_path / "out", UNITS, {"rank": 4, **job}, 10)


def begin(tmp_path: Path, *, stamps: dict[str, Any] = STAMPS, restart: bool = False, **job: Any) -> UnfinishedFolder:
    folder = folder_at(tmp_path, **job)
    folder.prepare(stamps, overwrite=True, restart=restart)
    folder.join(0)
    return folder


def make(folder: UnfinishedFolder, *units: str) -> None:
    for unit in units:
        folder.write(unit, TENSORS[unit], STAMPS[unit], {"unit": unit})


def finish(folder: UnfinishedFolder) -> None:
    def others(path: Path) -> dict[str, Any]:
        (path / "config.json").write_text("{}")
        return {"source": "here"}

    folder.complete(others)
    folder.leave()


def whole(target: Path) -> None:
    held: dict[str, torch.Tensor] = {}
    for file in target.glob("*.safetensors"):
        held.update(load_file(file))
    expected = TENSORS["first"] | TENSORS["second"]
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_it_appears_when_it_is_complete(tmp_path: Path):
    folder = begin(tmp_path / "new" / "parents")
    target = tmp_path / "new" / "parents" / "out"
    make(folder, "second", "first")
    folder.refresh()
    assert folder.finished == {"first": {"unit": "first"}, "second": {"unit": "second"}}
    assert not target.exists()
    finish(folder)
    whole(target)
    assert list(target.parent.iterdir()) == [target]
    manifest = read_json(target / MANIFEST_NAME)
    assert manifest["source"] == "here"
    assert manifest["files"].keys() == {f.name for f in target.iterdir()} - {MANIFEST_NAME}
    assert manifest["files"]["config.json"]["bytes"] == 2
    empty_object = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert manifest["files"]["config.json"]["sha256"] == empty_object


def test_what_is_finished_is_taken_over(tmp_path: Path):
    folder = begin(tmp_path)
    make(folder, "first")
    folder.leave()
    again = begin(tmp_path)
    assert again.finished == {"first": {"unit": "first"}}
    make(again, "second")
    finish(again)
    whole(tmp_path / "out")


def test_where_nothing_is_finished_nothing_stays(tmp_path: Path):
    begin(tmp_path / "new").leave()
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_and_damaged_tensors_are_not_taken_for_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = begin(tmp_path)
    make(folder, "first", "second")
    folder.leave()
    shard = next(folder.path.glob("model/model-00002*"))
    shard.write_bytes(bytes(len(shard.read_bytes())))  # the write did not reach the disk
    with (folder.path / "journal-0.jsonl").open("a") as journal:
        journal.write('{"unit": "sec')
    with caplog.at_level(logging.WARNING, "qosora"):
        again = begin(tmp_path)
    assert "they are damaged" in caplog.text
    assert again.finished.keys() == {"second"} or again.finished.keys() == {"first"}
    make(again, *(UNITS.keys() - again.finished.keys()))
    finish(again)
    whole(tmp_path / "out")


def test_a_missing_shard_is_made_anew(tmp_path: Path):
    folder = begin(tmp_path)
    make(folder, "first", "second")
    folder.leave()
    shutil.rmtree(folder.path / "model")
    again = begin(tmp_path)
    assert again.finished == {}
    again.leave()


def test_what_is_made_of_a_changed_file_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = begin(tmp_path)
    make(folder, "first", "second")
    folder.leave()
    with caplog.at_level(logging.WARNING, "qosora"):
        again = begin(tmp_path, stamps={**STAMPS, "second": [["file", 1, 3]]})
    assert "1 finished tensors are made anew, as the file that they are made of has changed" in caplog.text
    assert again.finished.keys() == {"first"}
    again.leave()


def test_another_job_is_refused_unless_it_begins_anew(tmp_path: Path):
    folder = begin(tmp_path)
    make(folder, "first")
    folder.leave()
    for other, message in (
        (folder_at(tmp_path, rank=8, seed=1), r"rank was 4, is 8, seed was None, is 1\. Go on as it was begun, or"),
        (UnfinishedFolder(tmp_path / "out", UNITS, {"rank": 4}, 11), "tensors was"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.prepare(STAMPS, overwrite=False, restart=False)
        other.leave()
    again = begin(tmp_path, rank=8, restart=True)
    assert again.finished == {}
    make(again, "first", "second")
    finish(again)
    whole(tmp_path / "out")


def test_files_that_are_not_ours_are_not_touched(tmp_path: Path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"out.partial is needed for the work, but holds 'thesis.tex'"):
        begin(tmp_path, restart=True)
    assert (tmp_path / "out.partial" / "thesis.tex").exists()


def test_two_at_once_are_refused(tmp_path: Path):
    folder = begin(tmp_path)
    other = folder_at(tmp_path)
    with pytest.raises(CheckpointError, match="another process is at work there"):
        other.prepare(STAMPS, overwrite=False, restart=True)
    other.leave()
    make(folder, "first", "second")
    finish(folder)
    whole(tmp_path / "out")


def old_model(target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text("old")


def test_the_old_model_stays_until_the_new_one_is_complete(tmp_path: Path):
    old_model(tmp_path / "out")
    folder = begin(tmp_path)
    make(folder, "first", "second")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    finish(folder)
    whole(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_ended_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old_model(tmp_path / "out")
    folder = begin(tmp_path)
    make(folder, "first", "second")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name == "model":
            raise PermissionError("no")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(PermissionError):
            finish(folder)
    folder.leave()
    assert not (tmp_path / "out").exists()
    again = begin(tmp_path)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert again.finished.keys() == UNITS.keys()
    finish(again)
    whole(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_ended_after_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = begin(tmp_path)
    make(folder, "first", "second")
    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedFolder, "remove", lambda self: None)
        finish(folder)
    assert folder.path.exists()
    again = folder_at(tmp_path)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        again.prepare(STAMPS, overwrite=False, restart=False)
    again.leave()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    whole(tmp_path / "out")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path):
    old_model(tmp_path / "disk")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    folder = begin(tmp_path)
    assert folder.path == tmp_path / "disk.partial"
    make(folder, "first", "second")
    finish(folder)
    assert (tmp_path / "out").is_symlink()
    whole(tmp_path / "disk")


def test_a_name_twice_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="a would be written twice"):
        UnfinishedFolder(tmp_path / "out", {"x": UNITS["first"], "y": UNITS["first"]}, {}, 10)


def test_the_journal_is_json_lines(tmp_path: Path):
    folder = begin(tmp_path)
    make(folder, "first")
    line = json.loads((folder.path / "journal-0.jsonl").read_text())
    assert line["sha256"].keys() == UNITS["first"].keys()
    folder.leave()

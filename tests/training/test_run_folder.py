"""The folder of a run: who may use it, and that it looks trained only when it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qosora.errors import ConfigError
from qosora.training.config import TrainConfig
from qosora.training.run_folder import WHOLE, MetricsLog, RunFolder


def config(folder: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model="base", data="data.jsonl", output_dir=str(folder), **options)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An interrupted run with checkpoints after steps 5 and 10."""
    RunFolder(config(tmp_path / "run")).begin(-1)
    for step in (5, 10):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in WHOLE:
            (checkpoint / name).write_text("{}")
    return tmp_path / "run"


def test_looking_at_a_folder_changes_nothing(tmp_path: Path):
    folder = RunFolder(config(tmp_path / "run", resume=True))
    assert (folder.resuming, folder.checkpoint(), folder.finished()) == (False, None, None)
    folder.discard()
    assert list(tmp_path.iterdir()) == []


def test_discard_leaves_what_was_there(tmp_path: Path):
    folder = RunFolder(config(tmp_path))
    folder.discard()
    assert tmp_path.is_dir()
    made = RunFolder(config(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    made.discard()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, options: dict[str, Any]):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds no qosora run"):
        RunFolder(config(tmp_path, **options))
    assert (tmp_path / "thesis.txt").read_text() == "x"
    with pytest.raises(ConfigError, match="holds no qosora run"):
        RunFolder(config(tmp_path / "thesis.txt", **options))


def test_overwrite_never_removes_what_the_run_reads(run: Path, monkeypatch: pytest.MonkeyPatch):
    for inside in (
        {"model": str(run / "base")},
        {"data": str(run / "data.jsonl")},
        {"eval_data": str(run / "test.csv")},
    ):
        values: dict[str, Any] = {"model": "base", "data": "data.jsonl", **inside}
        with pytest.raises(ConfigError, match="overwrite would remove all"):
            RunFolder(TrainConfig(**values, output_dir=str(run), overwrite=True))
    (run / "inner").mkdir()
    monkeypatch.chdir(run / "inner")
    with pytest.raises(ConfigError, match="overwrite would remove all"):
        RunFolder(config(run, overwrite=True))


def test_an_earlier_run_is_refused_replaced_or_resumed(run: Path):
    with pytest.raises(ConfigError, match=r"go on with it \(resume\), or replace it \(overwrite\)"):
        RunFolder(config(run))
    assert RunFolder(config(run, resume=True)).checkpoint() == run / "checkpoint-10"
    with pytest.raises(ConfigError, match="cannot be resumed with another seed"):
        RunFolder(config(run, resume=True, seed=1))
    replaced = RunFolder(config(run, overwrite=True))
    assert replaced.checkpoint() is None
    assert (run / "checkpoint-10").exists()
    replaced.begin(-1)
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "train_config.yaml"]


def test_the_saved_configuration_can_be_resumed(run: Path):
    RunFolder(config(run, overwrite=True)).begin(-1)
    again = TrainConfig.load(run / "train_config.yaml", {"resume": True})
    assert RunFolder(again).resuming


@pytest.mark.parametrize("name", WHOLE)
def test_a_checkpoint_that_is_not_whole_is_passed_over(run: Path, name: str):
    (run / "checkpoint-10" / name).unlink()
    assert RunFolder(config(run, resume=True)).checkpoint() == run / "checkpoint-5"


def test_a_checkpoint_cut_off_in_its_last_file(run: Path):
    (run / "checkpoint-10" / "trainer_state.json").write_text('{"global')
    assert RunFolder(config(run, resume=True)).checkpoint() == run / "checkpoint-5"


def test_metrics_forget_what_will_be_done_again(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    for step in range(4):
        log.append({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in log.read()] == [0, 1, 2, 3]
    log.forget_after(2)
    assert log.path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_finish_makes_it_an_adapter_last(run: Path, monkeypatch: pytest.MonkeyPatch):
    def write(target: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
            (target / name).write_text("{}")

    moved: list[str] = []
    replace = Path.replace

    def recorded(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recorded)
    RunFolder(config(run, resume=True)).finish({"steps": 3}, write)
    assert moved[-1] == "adapter_config.json"
    assert sorted(moved) == ["adapter_config.json", "adapter_model.safetensors", "result.json", "tokenizer.json"]
    assert RunFolder(config(run, resume=True)).finished() == {"steps": 3}
    assert json.loads((run / "result.json").read_text()) == {"steps": 3}


def test_a_failed_finish_is_no_adapter(run: Path):
    def write(target: Path) -> None:
        (target / "adapter_config.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        RunFolder(config(run, resume=True)).finish({}, write)
    assert not (run / "adapter_config.json").exists()
    assert RunFolder(config(run, resume=True)).finished() is None

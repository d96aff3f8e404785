"""The folder of a run: who may use it, and that it looks trained only when it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qosora.errors import CheckpointError, ConfigError
from qosora.training.config import TrainConfig
from qosora.training.run_folder import WHOLE, MetricsLog, RunFolder


def config(folder: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model="base", data="data.jsonl", output_dir=str(folder), **options)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An interrupted run with checkpoints after steps 5 and 10."""
    RunFolder(config(tmp_path / "run")).begin(-1, {})
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
    replaced.begin(-1, {})
    assert sorted(p.name for p in run.iterdir()) == ["made_of.json", "metrics.jsonl", "train_config.yaml"]


def test_a_run_without_a_step_is_begun_anew(tmp_path: Path):
    """As of one that was killed while its model was loaded: nothing would be lost."""
    run = tmp_path / "run"
    RunFolder(config(run)).begin(-1, {})
    RunFolder(config(run)).begin(-1, {})
    MetricsLog(run / "metrics.jsonl").append({"step": 0, "eval_loss": 1.0})
    again = RunFolder(config(run))
    again.begin(-1, {})
    again.discard()
    assert list(run.iterdir()) == []  # it was there before this one
    fresh = RunFolder(config(tmp_path / "fresh"))
    fresh.begin(-1, {})
    fresh.discard()
    assert not fresh.path.exists()
    fresh.begin(-1, {})
    MetricsLog(fresh.path / "metrics.jsonl").append({"step": 1, "loss": 1.0})
    fresh.discard()
    assert fresh.path.exists()
    with pytest.raises(ConfigError, match="holds an earlier run"):
        RunFolder(config(fresh.path))


def test_what_a_run_is_made_of_is_compared(run: Path):
    made_of = {"the training data": "a", "the evaluation data": "b", "examples_per_step": 4}
    RunFolder(config(run, resume=True)).begin(10, made_of)
    again = RunFolder(config(run, resume=True))
    again.check_made_of(made_of)
    with pytest.raises(ConfigError, match="cannot be resumed: the training data changed since it began"):
        again.check_made_of({**made_of, "the training data": "c"})
    with pytest.raises(ConfigError, match="takes 4 examples in a step, and this one would take 8"):
        again.check_made_of({**made_of, "examples_per_step": 8})
    (run / "made_of.json").unlink()
    again.check_made_of(made_of)  # as of runs that were begun before it was kept


def test_a_second_process_is_refused(tmp_path: Path):
    first, second = RunFolder(config(tmp_path / "new" / "run")), RunFolder(config(tmp_path / "new" / "run"))
    with first.locked(), pytest.raises(CheckpointError, match="another process is at work there"), second.locked():
        pass
    with second.locked():
        pass


def test_the_configuration_in_a_runs_folder_means_that_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    TrainConfig(model="base", data="data.jsonl", output_dir="run").save(run / "train_config.yaml")
    (tmp_path / "data.jsonl").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = TrainConfig.load("../run/train_config.yaml", {"resume": True})
    assert (found.output_dir, found.data, found.model) == (str(run), str(tmp_path / "data.jsonl"), "base")
    assert RunFolder(found).checkpoint() == run / "checkpoint-10"
    assert TrainConfig.load("../run/train_config.yaml").output_dir == "run"  # a new run of the same kind
    other = TrainConfig.load("../run/train_config.yaml", {"resume": True, "output_dir": "other"})
    assert other.output_dir == "other"


def test_the_saved_configuration_can_be_resumed(run: Path):
    RunFolder(config(run, overwrite=True)).begin(-1, {})
    again = TrainConfig.load(run / "train_config.yaml", {"resume": True})
    assert RunFolder(again).resuming


@pytest.mark.parametrize("name", WHOLE)
def test_a_checkpoint_that_is_not_whole_is_passed_over(run: Path, name: str):
    (run / "checkpoint-10" / name).unlink()
    assert RunFolder(config(run, resume=True)).checkpoint() == run / "checkpoint-5"


def test_a_checkpoint_cut_off_in_its_last_file(run: Path):
    (run / "checkpoint-10" / "trainer_state.json").write_text('{"global')
    assert RunFolder(config(run, resume=True)).checkpoint() == run / "checkpoint-5"


def test_going_on_removes_what_was_half_written_or_to_be_removed(run: Path):
    for step in (15, 20, 25):
        shutil.copytree(run / "checkpoint-10", run / f"checkpoint-{step}")
    (run / "checkpoint-25" / "optimizer.pt").unlink()
    state = {"global_step": 20, "best_model_checkpoint": "elsewhere/checkpoint-5"}
    (run / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(state))
    RunFolder(config(run, resume=True)).begin(20, {})
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-20", "checkpoint-5"]


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
    assert sorted(moved) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "qosora_manifest.json",
        "result.json",
        "tokenizer.json",
    ]
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

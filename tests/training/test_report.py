"""A page of one run or several: what is on it, and that the movements are those of the vectors."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import sums

from qosora.cli import main
from qosora.errors import CheckpointError, ConfigError
from qosora.memory import planned_peak
from qosora.memory.plan import plan
from qosora.training.config import TrainConfig
from qosora.training.report import movements, report
from qosora.training.run import TrainResult


def test_a_page_of_one_run(place: Path, run: TrainResult, tmp_path: Path):
    folder = tmp_path / "my run"
    shutil.copytree(place / "run", folder)
    file = report([folder])
    assert file == folder / "report.html"
    text = file.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,iVBORw0KGgo") == 2
    assert "<p>my run (sft)</p>" in text
    assert f"<td>trained parameters</td><td>{run.trained_parameters:,}</td>" in text
    assert "<td>gradient_accumulation</td><td>2</td>" in text
    assert "<td>packing</td>" not in text  # as it is by default
    assert not re.search(r'(src|href)="(?!data:)', text)  # it needs no network


def test_the_plan_is_beside_what_was_measured(place: Path, run: TrainResult, tmp_path: Path):
    shutil.copytree(place / "run", tmp_path / "run")
    text = report([tmp_path / "run"], planned=planned_peak).read_text(encoding="utf-8")
    expected = plan(
        place / "base", batch_size=2, seq_len=run.longest, precision="fp32", device="cpu", tile_length=16, grid=False,
        compare=False,
    ).usage.allocated_bytes  # fmt: skip
    assert run.longest == max(len(f"<{row['prompt']}{row['completion']}>") for row in sums(16))
    assert f"at the peak, without the program</td><td>{expected:,}</td>" in text
    config = TrainConfig.load(tmp_path / "run" / "train_config.yaml", {"model": str(tmp_path / "gone")})
    assert planned_peak(config, 8, "fp32") is None


def test_runs_beside_each_other(place: Path, run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a", "b/a"):
        shutil.copytree(place / "run", tmp_path / name)
    (tmp_path / "b/a/result.json").unlink()  # it has not ended
    output = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b/a"), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    text = output.read_text(encoding="utf-8")
    assert f"<th>{tmp_path / 'a'}</th><th>{tmp_path / 'b/a'}</th>" in text
    assert f"<td>steps</td><td>{run.steps}</td><td></td>" in text


def test_a_run_that_has_not_ended(place: Path, run: TrainResult, tmp_path: Path):
    folder = tmp_path / "begun"
    folder.mkdir()
    for name in ("metrics.jsonl", "train_config.yaml"):
        shutil.copy(place / "run" / name, folder)
    text = report([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "not finished yet" in text
    assert text.count("data:image/png") == 1


def test_movements(place: Path, run: TrainResult):
    moved = movements(place / "run")
    adapter, base = load_file(place / "run" / "adapter_model.safetensors"), load_file(place / "base/model.safetensors")
    assert set(moved) == {"s", "o"}
    places = {("mlp.down_proj", 0), ("self_attn.q_proj", 1)}
    assert places <= set(moved["s"]) == set(moved["o"])
    for projection, layer in places:
        name = f"model.layers.{layer}.{projection}"
        s, o = (adapter[f"base_model.model.{name}.osora_{vector}"] for vector in ("s", "o"))
        before = base[f"{name}.s"]
        assert moved["s"][projection, layer] == pytest.approx(float((s - before).norm() / before.norm()), rel=1e-5)
        assert moved["o"][projection, layer] == pytest.approx(float((o - 1).square().mean().sqrt()), rel=1e-5)
    assert all(value > 0 for vector in moved.values() for value in vector.values())


def test_without_its_base_only_o_is_compared(
    place: Path, run: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(place / "run", tmp_path / "run")  # whose base is not beside it
    monkeypatch.setattr("qosora.training.report.split_source", _no_base)
    assert set(movements(tmp_path / "run")) == {"o"}


def _no_base(source: str) -> tuple[str, str]:
    raise CheckpointError(f"no base of {source}")


def test_what_is_no_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CheckpointError, match=r"holds no run: it has no train_config\.yaml and metrics\.jsonl"):
        report([tmp_path])
    monkeypatch.setattr("qosora.pages.can_draw", lambda: False)
    with pytest.raises(ConfigError, match="pip install 'qosora\\[plots\\]'"):
        report([tmp_path])


def test_experts_are_taken_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Reader:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Reader:
            return self

        def __exit__(self, *_: object) -> None: ...

        def names(self) -> list[str]:
            return [f"base_model.model.model.layers.3.mlp.experts.{i}.up_proj.osora_o" for i in (0, 1)]

        def tensor(self, name: str) -> torch.Tensor:
            return torch.full((4,), 1.5 if ".0.up" in name else 1.25)

    monkeypatch.setattr("qosora.training.report.CheckpointReader", Reader)
    assert movements(tmp_path) == {"o": {("mlp.experts.*.up_proj", 3): 0.375}}


def test_trackio_gets_one_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the evaluation before training and the one after it; what --json prints is JSON alone."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    command = [sys.executable, "-m", "qosora", "train", "--model", place / "base", "--data", place / "train.jsonl",
               "--eval-data", place / "test.jsonl", "--output-dir", tmp_path / "my-run", "--max-steps", "2",
               "--report-to", "trackio", "--trl", "project=tried", "--json"]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["steps"] == 2
    rows = (
        sqlite3.connect(tmp_path / "trackio" / "tried.db").execute("select run_name, metrics from metrics").fetchall()
    )
    assert {name for name, _ in rows} == {"my-run"}
    losses = [json.loads(metrics).get("eval/loss") for _, metrics in rows]
    assert sum(loss is not None for loss in losses) == 2

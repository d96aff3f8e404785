"""Bases and data to train on, and short runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_base, make_checkpoint, sums, write_jsonl

from qosora.config import QosoraConfig
from qosora.training.config import TrainConfig
from qosora.training.run import TrainResult, train
from qosora.training.run_folder import MetricsLog


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ordinary checkpoint, two bases and data; tests write nothing into it."""
    folder = tmp_path_factory.mktemp("place")
    make_base(folder / "base", make_checkpoint(folder / "llama", "llama-text"), QosoraConfig(rank=16))
    make_base(folder / "tied", make_checkpoint(folder / "gemma3", "gemma3-text"))
    write_jsonl(folder / "train.jsonl", sums(16))
    write_jsonl(folder / "test.jsonl", sums(6, 100))
    return folder


#: Options of the run below.
RUN: dict[str, Any] = {
    "batch_size": 2, "gradient_accumulation": 2, "save_steps": 4, "save_total_limit": None, "tile_length": 16,
}  # fmt: skip


@pytest.fixture(scope="session")
def run(place: Path) -> TrainResult:
    """An uninterrupted run of two and a half epochs with evaluation and checkpoints, in `place`/run."""
    return train(config(place, place / "run", **RUN, eval_data=str(place / "test.jsonl")))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def config(place: Path, output: Path, **options: Any) -> TrainConfig:
    defaults = {"model": str(place / "base"), "data": str(place / "train.jsonl"), "progress": False, "max_steps": 10}
    return TrainConfig(**{**defaults, "output_dir": str(output), **options})


def metrics(folder: Path) -> list[dict[str, Any]]:
    return MetricsLog(folder / "metrics.jsonl").read()

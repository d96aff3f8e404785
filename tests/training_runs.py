"""Bases and data to train on, and short runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_base, make_checkpoint, sums, write_jsonl

from qosora.config import QosoraConfig
from qosora.training.config import TrainConfig
from qosora.training.run_folder import MetricsLog


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ordinary checkpoint, two bases and data."""
    folder = tmp_path_factory.mktemp("place")
    make_base(folder / "base", make_checkpoint(folder / "llama", "llama-text"), QosoraConfig(rank=16))
    make_base(folder / "tied", make_checkpoint(folder / "gemma3", "gemma3-text"))
    write_jsonl(folder / "train.jsonl", sums(16))
    write_jsonl(folder / "test.jsonl", sums(6, 100))
    return folder


def config(place: Path, output: Path, **options: Any) -> TrainConfig:
    defaults = {"model": str(place / "base"), "data": str(place / "train.jsonl"), "progress": False, "max_steps": 10}
    return TrainConfig(**{**defaults, "output_dir": str(output), **options})


def metrics(folder: Path) -> list[dict[str, Any]]:
    return MetricsLog(folder / "metrics.jsonl").read()

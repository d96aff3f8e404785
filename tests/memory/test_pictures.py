"""Steps with images: planned as they are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from seeing import make_seeing, squares
from tiny import make_base, make_checkpoint, write_jsonl

from qosora.base import quantize
from qosora.cli import main
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError
from qosora.memory import batch_with_images, fit_batch_size, plan_run
from qosora.memory.plan import plan
from qosora.memory.profile import profile
from qosora.training import TrainConfig, preview_run

IMAGES: dict[str, Any] = {"image_size": (28, 28)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    quantize(make_seeing(folder / "llava"), folder / "base", QosoraConfig(rank=8))
    rows = squares(folder / "pictures", 12)
    rows[5]["messages"][0]["content"] = "which colour is it?"
    write_jsonl(folder / "train.jsonl", rows)
    return folder


@pytest.mark.parametrize("images", [1, 3])
def test_a_batch_has_so_many_tokens_and_images(place: Path, images: int):
    made = batch_with_images(place / "base", batch_size=2, seq_len=50, images=images, **IMAGES)
    assert made["input_ids"].shape == made["labels"].shape == made["attention_mask"].shape == (2, 50)
    assert (made["input_ids"] == 258).sum(1).tolist() == [4 * images] * 2
    assert made["pixel_values"].shape == (2 * images, 3, 28, 28)
    assert made["attention_mask"].all()


def test_without_a_template_the_images_have_their_tokens(place: Path, tmp_path: Path):
    for file in (place / "base").glob("*"):
        if "template" not in file.name and file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    made = batch_with_images(tmp_path, batch_size=1, seq_len=50, images=2, **IMAGES)
    assert (made["input_ids"] == 258).sum() == 8


def test_what_cannot_be_made_is_told(place: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="an example with 9 images of 28 x 28 pixels has"):
        batch_with_images(place / "base", seq_len=20, images=9, **IMAGES)
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        batch_with_images(place / "base", images=0)
    make_base(tmp_path / "blind", make_checkpoint(tmp_path / "llama", "llama-text"), QosoraConfig(rank=8))
    with pytest.raises(ConfigError, match="takes no images"):
        batch_with_images(tmp_path / "blind")
    (tmp_path / "config.json").write_bytes((place / "base" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no processor of images there"):
        batch_with_images(tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": False}, {"gradient_checkpointing": False, "chunked_loss": False}]
)
@pytest.mark.parametrize("size", [3, 12])
def test_planned_is_measured_to_the_byte(place: Path, options: dict[str, Any], size: int):
    found = profile(
        str(place / "base"), data=str(place / "train.jsonl"), batch_size=size, seq_len=128, steps=1, precision="fp32",
        **options,
    )  # fmt: skip
    assert found.planned is not None
    assert found.planned.allocated_bytes == found.live.allocated_bytes
    assert found.planned.phases["forward"] == found.live.phases["forward"]
    assert found.planned.phases["backward"] == pytest.approx(found.live.phases["backward"], rel=0.02)


def test_images_are_in_the_plan_of_a_run_and_in_the_batch_that_fits(place: Path, tmp_path: Path):
    config = TrainConfig(
        model=str(place / "base"), data=str(place / "train.jsonl"), output_dir=str(tmp_path / "run"), batch_size=2,
        precision="fp32", progress=False,
    )  # fmt: skip
    found = preview_run(config)
    takes = {
        n: plan_run(replace(config, batch_size=n), found, gpu_memory="24GiB").usage.total_bytes for n in (1, 2, 4, 8)
    }
    assert sorted(takes.values()) == list(takes.values())
    alone = plan(
        place / "base", batch_size=8, seq_len=found.longest, grid=False, gpu_memory="24GiB", precision="fp32"
    ).usage
    assert takes[8] != alone.total_bytes
    half = plan_run(replace(config, precision="auto"), found, gpu_memory="24GiB")  # on a card
    rows = plan_run(config, found, gpu_memory="24GiB").usage.rows
    assert rows["batch"] - half.usage.rows["batch"] == 2 * 3 * 28 * 28 * 2
    asked = TrainConfig(**{**config.to_dict(), "batch_size": "auto", "gradient_accumulation": 2})
    assert fit_batch_size(asked, gpu_memory=f"{takes[4] + 2**12}B").batch_size == 4


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--seq-len", "64", "--batch-size", "2", "--gpu-memory", "8GiB"]
    assert main(["plan", str(place / "base"), *options, "--images", "2", "--image-size", "28x28"]) == 0
    out = capsys.readouterr().out
    assert "2 x 64 tokens" in out
    assert "a text without images" not in out
    assert main(["plan", str(place / "base"), *options, "--no-grid"]) == 0
    assert "assumed: a text without images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", str(place / "base"), "--images", "1", "--image-size", "28"])
    assert "must be a width and a height, such as 1024x768, got '28'" in capsys.readouterr().err
    assert torch.get_default_device().type == "cpu"

"""The plan of a training run, and the batch that it fits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_base, make_checkpoint, sums, write_jsonl

from qosora import QosoraConfig
from qosora.errors import ConfigError
from qosora.memory import fit_batch_size, plan_run, run
from qosora.training import TrainConfig, preview_run, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    make_base(folder / "base", make_checkpoint(folder / "source", "llama-text"), QosoraConfig(rank=8))
    write_jsonl(folder / "train.jsonl", sums(24))
    return folder


def config(folder: Path, **more: Any) -> TrainConfig:
    more = {"batch_size": "auto", **more}
    return TrainConfig(
        model=str(folder / "base"), data=str(folder / "train.jsonl"), output_dir=str(folder / "out"), **more
    )


def test_the_largest_that_fits(folder: Path):
    """By plans of cards whose memory lies between what two batches take."""
    asked = config(folder, gradient_accumulation=8, precision="bf16")
    found = preview_run(config(folder, batch_size=1, precision="bf16"))
    takes = {
        n: plan_run(config(folder, batch_size=n, precision="bf16"), found, gpu_memory="24GiB").usage.total_bytes
        for n in (1, 8, 16, 32)
    }
    assert sorted(takes.values()) == list(takes.values())
    for size, memory in ((32, takes[32] + 2**20), (8, takes[16] - 2**16)):
        settled = fit_batch_size(asked, gpu_memory=f"{memory}B")
        assert (settled.batch_size, settled.gradient_accumulation) == (size, 32 // size)
    with pytest.raises(ConfigError, match=r"not even one example of \d+ tokens fits into .*: "):
        fit_batch_size(asked, gpu_memory=f"{takes[1] - 2**22}B")


def test_compiled_layers_are_planned_as_others_and_it_says_so(folder: Path):
    found = preview_run(config(folder, batch_size=1, precision="bf16"))
    plain, compiled = (
        plan_run(config(folder, batch_size=1, precision="bf16", compile=on), found, gpu_memory="24GiB")
        for on in (False, True)
    )
    assert compiled.usage == plain.usage
    assert compiled.assumptions[:-1] == plain.assumptions
    assert compiled.assumptions[-1].startswith("compiled layers are planned as others")


def test_without_a_card_it_is_the_default(folder: Path):
    settled = fit_batch_size(config(folder, gradient_accumulation=2))
    assert (settled.batch_size, settled.gradient_accumulation) == (4, 2)
    given = config(folder, batch_size=3)
    assert fit_batch_size(given) is given


def test_what_is_tight_is_taken_for_one_example_only(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def planned(settled: TrainConfig, *_: Any, **__: Any) -> Any:
        asked.append(settled.batch_size)
        return SimpleNamespace(verdict="tight")

    monkeypatch.setattr(run, "plan_run", planned)
    settled = fit_batch_size(config(folder, gradient_accumulation=3), gpu_memory="24GiB")
    assert asked == [12, 6, 4, 3, 2, 1]
    assert (settled.batch_size, settled.gradient_accumulation) == (1, 12)


def test_where_nobody_has_settled_it(folder: Path):
    with pytest.raises(ConfigError, match=r"train\(qosora.memory.fit_batch_size\(config\)\)"):
        train(config(folder))


def test_answers_that_the_model_writes_are_counted(folder: Path):
    """By their keys and values: all answers of a step are written at once, however they are divided into batches."""
    options: dict[str, Any] = {"method": "grpo", "reward": ["exact"], "num_generations": 4, "precision": "bf16"}

    def planned(length: int, size: int, accumulation: int = 1) -> Any:
        asked = config(
            folder, batch_size=size, gradient_accumulation=accumulation, max_completion_length=length, **options
        )
        return plan_run(asked, preview_run(asked), gpu_memory="24GiB")

    answers = {key: planned(*key).usage.phases["answers"] for key in ((16, 4, 1), (16, 8, 1), (16, 4, 2), (32, 4, 1))}
    assert answers[16, 4, 1] < answers[16, 8, 1] < 2.1 * answers[16, 4, 1]
    assert answers[16, 4, 2] == pytest.approx(answers[16, 8, 1], rel=0.01)
    assert answers[16, 4, 1] < answers[32, 4, 1]
    plain = config(folder, batch_size=4)
    assert "answers" not in plan_run(plain, preview_run(plain)).usage.phases
    short = planned(32, 8)
    asked = config(folder, batch_size="auto", gradient_accumulation=2, max_completion_length=32, **options)
    assert fit_batch_size(asked, gpu_memory="24GiB").batch_size == 8
    memory = short.usage.total_bytes - 2**12
    with_less = config(folder, batch_size=8, max_completion_length=32, **options)
    less = plan_run(with_less, preview_run(with_less), gpu_memory=f"{memory}B")
    assert less.verdict != "fits"
    assert any(advice.change.startswith("--max-completion-length 16") for advice in less.advice)
    assert not any("--seq-len" in advice.change for advice in less.advice)


def test_as_it_is_written(folder: Path, tmp_path: Path):
    asked = config(folder)
    asked.save(tmp_path / "run.yaml")
    assert TrainConfig.load(tmp_path / "run.yaml") == asked
    (tmp_path / "run.yaml").write_text("model: a\ndata: b\noutput_dir: c\nbatch_size: auto\n")
    assert TrainConfig.load(tmp_path / "run.yaml").batch_size == asked.batch_size
    with pytest.raises(ConfigError, match="batch_size must be an integer, got 'most'"):
        config(folder, batch_size="most")
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got -1"):
        config(folder, batch_size=-1)

"""Every way of learning, from data to an adapter: what it begins at, that it learns, and that it goes on unchanged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_jsonl
from training_runs import config, metrics

from qosora.base.load import load_model
from qosora.errors import ConfigError, DataError
from qosora.training.config import FIGURES
from qosora.training.methods import METHODS
from qosora.training.run import TrainResult, train
from qosora.training.trainer import TRAINERS

PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a - b - 1}"} for a in range(2, 6) for b in range(2, 6)
]
RUN: dict[str, Any] = {
    "max_steps": 6, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 1e-2, "save_steps": 3,
    "eval_batch_size": 4, "max_length": 64,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {"learning_rate": 5e-2},
    "orpo": {},
    "grpo": {"max_completion_length": 5, "num_generations": 4, "learning_rate": 5e-2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options that name files: pairs, and a reward that a random model meets now and then."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "rewards.py").write_text(
        "def digits(completions, **_):\n    return [sum(c in '0123456789' for c in text) for text in completions]\n"
    )
    return {
        "data": str(write_jsonl(folder / "pairs.jsonl", PAIRS)),
        "eval_data": str(write_jsonl(folder / "held_out.jsonl", PAIRS[:4])),
        "reward": [f"{folder}/rewards.py:digits"],
    }


def options(data: dict[str, Any], method: str) -> dict[str, Any]:
    needed = data if method == "grpo" else {**data, "reward": []}
    return {**RUN, **needed, "method": method, **OWN[method]}


@pytest.fixture(scope="module")
def runs(place: Path, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    folder = tmp_path_factory.mktemp("runs")
    return {method: train(config(place, folder / method, **options(data, method))) for method in OWN}


def vectors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


#: Of models of other kinds: test_heads.
OF_HEADS = ["reward", "classify"]


def test_one_table_for_all():
    assert (
        list(METHODS) == list(FIGURES) == list(TRAINERS) == ["sft", *OWN, "reward", "classify"]
    )  # the last two: test_heads


def test_what_each_begins_at(runs: dict[str, TrainResult]):
    assert metrics(Path(runs["dpo"].output_dir))[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics(Path(runs["kto"].output_dir))[0]["eval_loss"] == pytest.approx(0.5, abs=1e-6)
    for method, result in runs.items():
        lines = metrics(Path(result.output_dir))
        assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
        assert result.method == method
        assert result.steps == 6


def test_each_learns(runs: dict[str, TrainResult]):
    for method in ("dpo", "kto", "orpo"):
        before, after = runs[method].figures["eval_loss"]
        assert after < before - 1e-3, method
    assert runs["dpo"].figures["eval_rewards/accuracies"][1] == 1
    before, after = runs["grpo"].figures["eval_reward"]
    assert after > before


def test_the_summary_says_what_shows_success(runs: dict[str, TrainResult]):
    text = "\n".join(runs["dpo"].summary())
    assert "rewards/accuracies" in text
    assert "on 16 examples (" in text
    text = "\n".join(runs["grpo"].summary())
    assert "on 16 examples in" in text
    assert "reward " in text
    assert "perplexity" not in text


@pytest.mark.parametrize("method", list(OWN))
def test_a_run_goes_on_to_the_bit(
    place: Path, tmp_path: Path, data: dict[str, Any], runs: dict[str, TrainResult], method: str
):
    folder = tmp_path / "run"
    shutil.copytree(runs[method].output_dir, folder)
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "result.json").unlink()
    result = train(config(place, folder, **options(data, method), resume=True))
    assert result.resumed_from == 3
    expected = vectors(runs[method].output_dir)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vectors(folder).items())
    losses = [[line["loss"] for line in metrics(Path(f)) if "loss" in line] for f in (folder, runs[method].output_dir)]
    assert losses[0] == losses[1]
    tokens = [[line.get("tokens") for line in metrics(Path(f))] for f in (folder, runs[method].output_dir)]
    assert tokens[0] == tokens[1]


def test_an_adapter_is_the_reference_of_a_run_that_begins_with_it(
    place: Path, tmp_path: Path, data: dict[str, Any], runs: dict[str, TrainResult]
):
    begun = runs["dpo"].output_dir
    result = train(config(place, tmp_path / "run", **{**options(data, "dpo"), "model": begun, "max_steps": 1}))
    assert result.figures["eval_loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"checkpoint-1"}
    names = set(vectors(tmp_path / "run"))
    assert names == set(vectors(begun))
    load_model(tmp_path / "run")


def test_a_base_in_host_memory_learns_the_same(
    place: Path, tmp_path: Path, data: dict[str, Any], runs: dict[str, TrainResult]
):
    for method in ("dpo", "grpo"):
        result = train(config(place, tmp_path / method, **options(data, method), base_on="host"))
        expected = vectors(runs[method].output_dir)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in vectors(result.output_dir).items()), method


def test_answers_that_are_all_worth_the_same_are_told(
    place: Path, tmp_path: Path, data: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    chosen = {**options(data, "grpo"), "reward": ["regex:^never$"], "max_steps": 1, "eval_data": None}
    train(config(place, tmp_path / "run", **chosen))
    assert "always worth the same, so nothing was learned" in caplog.text


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("grpo", {"num_generations": 3}, "num_generations"),
        ("grpo", {"max_completion_length": 4000}, "the model takes .*; set max_completion_length to at most"),
        ("grpo", {"reward": ["exact:solution"]}, "compares with the column 'solution'"),
        ("grpo", {"prompt_column": "question"}, "has no column 'question'"),
        ("dpo", {"prompt_column": "question"}, "has no column 'question'"),
        ("dpo", {"trl": {"packing": True}}, "packing"),
        ("dpo", {"trl": {"bta": 1}}, "TRL's DPOConfig has no option 'bta'; did you mean 'beta'"),
        ("kto", {"trl": {"beta": 1}}, "trl: beta is the option 'beta' of qosora; set that"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(
    place: Path, nothing_left: Path, data: dict[str, Any], method: str, changes: dict[str, Any], expected: str
):
    with pytest.raises((ConfigError, DataError), match=expected):
        train(config(place, nothing_left, **{**options(data, method), **changes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "ppo"}, "method must be one of sft, dpo, kto, orpo, grpo"),
        ({"method": "grpo"}, "method grpo needs a reward"),
        ({"reward": ["exact"]}, "reward is for method grpo, and this is sft"),
        ({"method": "dpo", "packing": True}, "packing is for method sft, and this is dpo"),
        ({"beta": 0.1}, "beta is for method dpo or kto or orpo or grpo, and this is sft"),
        ({"method": "orpo", "activation_offloading": True}, "activation_offloading is for method sft or dpo or kto"),
    ],
)
def test_options_of_another_method_are_told(place: Path, tmp_path: Path, changes: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        config(place, tmp_path / "run", **changes)


def test_other_rewards_are_another_run(place: Path, tmp_path: Path, data: dict[str, Any]):
    file = tmp_path / "rewards.py"
    file.write_text(Path(data["reward"][0].partition(":")[0]).read_text())
    chosen = {**options(data, "grpo"), "reward": [f"{file}:digits"], "max_steps": 3, "eval_data": None}
    train(config(place, tmp_path / "run", **chosen))
    (tmp_path / "run" / "result.json").unlink()
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"cannot be resumed: the rewards in .*rewards.py changed"):
        train(config(place, tmp_path / "run", **chosen, resume=True))


def test_the_result_is_plain_data(runs: dict[str, TrainResult]):
    for result in runs.values():
        assert TrainResult(**json.loads(json.dumps(result.to_dict()))) == result

"""What a run would train on is what it trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tokenizer, sums, write_jsonl
from training_runs import config

from qosora.cli import main
from qosora.cli.train import _marked
from qosora.data import IGNORED, Example
from qosora.errors import ConfigError
from qosora.training import train
from qosora.training.preview import preview_run, tokens_of


@pytest.mark.parametrize(
    "options",
    [{"max_steps": None, "epochs": 2.5}, {"max_steps": 3}, {"max_steps": None, "gradient_accumulation": 3}],
)
def test_counts_and_steps_are_the_runs(place: Path, tmp_path: Path, options: dict[str, Any]):
    settings = config(place, tmp_path / "run", eval_data=str(place / "test.jsonl"), batch_size=3, **options)
    found = preview_run(settings)
    assert not (tmp_path / "run").exists()
    result = train(settings)
    assert (found.examples, found.supervised, found.steps) == (
        result.examples, result.supervised_tokens, result.steps
    )  # fmt: skip
    assert found.evaluated == 6
    assert found.precision == result.precision


def test_what_is_cut_and_left_out(place: Path, tmp_path: Path):
    rows = [*sums(3), {"prompt": "a" * 60, "completion": "b"}, {"prompt": "1", "completion": "c" * 60}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    found = preview_run(config(place, tmp_path / "run", data=str(data), max_length=24))
    assert (found.examples, found.cut, found.dropped, found.longest) == (4, 2, 1, 24)
    assert found.lost > 0


def test_packing_decides_the_steps(place: Path, tmp_path: Path):
    assert preview_run(config(place, tmp_path / "run", max_steps=None, packing=True)).steps is None


def test_texts_of_tokens_are_the_example(place: Path, tmp_path: Path):
    found = preview_run(config(place, tmp_path / "run"))
    for tokens in found.shown:
        whole = "".join(text for text, _ in tokens)
        trained = "".join(text for text, trained in tokens if trained)
        prompt, _, answer = whole.partition("=")
        assert prompt
        assert trained.startswith(answer)


@pytest.mark.parametrize("text", ["1 + 2 = 3", "grüße, 世界 🙂!", "a" * 500, "word " * 200])
def test_parts_of_characters_and_long_texts(text: str):
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    example = Example(np.array(ids, dtype=np.int32), np.array([IGNORED, *ids[1:]], dtype=np.int32))
    tokens = list(tokens_of(tokenizer, example))
    assert len(tokens) == len(ids)
    assert [trained for _, trained in tokens] == [False] + [True] * (len(ids) - 1)
    assert "".join(part for part, _ in tokens) == tokenizer.decode(ids)


def test_marks():
    tokens = [("1 +", False), (" 1", False), (" =", False), (" 2", True), ("\x1b[31m", True)]
    assert _marked(tokens, colour=False) == "1 +| 1| =|[[ 2|\\x1b[31m]]"
    assert _marked(tokens, colour=True) == "1 +| 1| =|\x1b[1;32m 2|\\x1b[31m\x1b[0m"


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["train", "--model", str(place / "base"), "--data", str(place / "train.jsonl"), "--output-dir",
            str(tmp_path / "run"), "--dry-run"]  # fmt: skip
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "--- example 1 of " in said
    assert "[[" in said
    assert "16 examples" in said
    assert "4 steps of 4 x 1 examples" in said
    assert "in all" in said
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--gpu", "RTX 4090", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["verdict"] == "fits"
    assert found["data"]["examples"] == 16
    assert main([*argv[:-1], "--gpu", "RTX 4090"]) == 2
    assert "with --dry-run" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        preview_run(config(place, place / "base"))

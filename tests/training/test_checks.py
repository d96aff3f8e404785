"""What is checked before a model is loaded: mistakes in options, data and folders, in one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_base, make_checkpoint
from training_runs import config

from qosora.errors import CheckpointError, ConfigError, DataError
from qosora.training.run import train


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ('{"prompt": "abcdefgh", "completion": "x"}\n', {"max_length": 4}, "the prompts alone fill max_length=4"),
        ("", {}, "is empty: it has no example"),
        ('{"prompt": "a", "completion": "x"}\n{"prompt"\n', {}, "line 2: broken JSON"),
        ('{"question": "a"}\n', {}, "its columns are question"),
        ('{"prompt": "' + "a" * 600 + '", "completion": "x"}\n', {}, "the model takes 512"),
    ],
)
def test_bad_data(place: Path, nothing_left: Path, tmp_path: Path, text: str, options: dict[str, Any], expected: str):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises((DataError, ConfigError), match=expected) as caught:
        train(config(place, nothing_left, data=str(tmp_path / "data.jsonl"), **options))
    assert "\n" not in str(caught.value)


def test_bad_evaluation_data(place: Path, nothing_left: Path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        train(config(place, nothing_left, eval_data=str(place / "none.jsonl")))


def test_a_tokenizer_of_another_model(place: Path, nothing_left: Path, tmp_path: Path):
    base = make_base(
        tmp_path / "base",
        make_checkpoint(tmp_path / "llama", "llama-text", vocab_size=250, eos_token_id=1, bos_token_id=2),
    )
    with pytest.raises(DataError, match="belong to another model"):
        train(config(place, nothing_left, model=str(base)))


def test_a_model_that_is_no_base(place: Path, nothing_left: Path):
    with pytest.raises(CheckpointError, match=r"an ordinary checkpoint, not a qosora base.*qosora quantize SRC OUT"):
        train(config(place, nothing_left, model=str(place / "llama")))
    with pytest.raises(CheckpointError, match="no model there"):
        train(config(place, nothing_left, model=str(place / "none")))

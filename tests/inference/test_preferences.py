"""Rewards of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_checkpoint, sums

from qosora import load_base, load_tokenizer
from qosora.base import quantize
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, DataError
from qosora.inference import evaluate_rewards

PAIRS: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" no, {i}"} for i, row in enumerate(sums(7))
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    quantize(make_checkpoint(folder / "llama", "llama-text"), folder / "base", QosoraConfig(rank=8), task="reward")
    return folder / "base"


def test_it_is_what_the_model_says_of_each_answer_alone(base: Path):
    """Against single answers in float64, without padding."""
    model, tokenizer = load_base(base), load_tokenizer(base)
    result = evaluate_rewards(model, tokenizer, PAIRS, batch_size=3)
    exact = load_base(base).dequantize().double()

    def reward(text: str) -> torch.Tensor:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            return exact(input_ids=ids).logits[0, 0]

    # the end of a text is the token before those that fill up, and here the same token ends texts and fills up
    margins = torch.stack(
        [reward(row["prompt"] + row["chosen"]) - reward(row["prompt"] + row["rejected"]) for row in PAIRS]
    )
    assert result.pairs == len(PAIRS)
    assert result.margin == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-5)
    assert result.loss == pytest.approx(-F.logsigmoid(margins).mean().item(), rel=1e-4)
    assert result.accuracy == pytest.approx((margins > 0).double().mean().item())


def test_what_cannot_be_measured(base: Path, tmp_path: Path):
    model, tokenizer = load_base(base), load_tokenizer(base)
    with pytest.raises(DataError, match="are longer than max_length=3"):
        evaluate_rewards(model, tokenizer, PAIRS, max_length=3)
    quantize(base.parent / "llama", tmp_path / "plain", QosoraConfig(rank=8))
    with pytest.raises(CheckpointError, match="is no model of rewards"):
        evaluate_rewards(load_base(tmp_path / "plain"), tokenizer, PAIRS)

"""How often a model of rewards prefers the better answer.

loss = mean of -log σ(r_better - r_worse)        accuracy = pairs with r_better > r_worse / all
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from qosora.checkpoints import REWARD, task_of
from qosora.data import (
    Columns,
    load_records,
    padded,
    prepare,
    refuse_unfit,
    split_to_measure,
)
from qosora.errors import CheckpointError
from qosora.inference.classification import pad_token
from qosora.inference.generation import inference

__all__ = ["RewardResult", "evaluate_rewards"]


@dataclass(frozen=True)
class RewardResult:
    """What `evaluate_rewards` found; `margin` is the mean difference of the rewards, `pairs` how many were compared."""

    loss: float
    accuracy: float
    margin: float
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def evaluate_rewards(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    split: str | None = None,
    columns: Columns | None = None,
    chat: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
) -> RewardResult:
    """Measure a model of rewards on preferences.

    Args:
        model: With or without an adapter.
        tokenizer: Its tokenizer.
        data: What `qosora.data.load_records` reads.
        split: Of a hub data set; "test" by default.
        columns: As in `load_records`.
        chat: As in `load_records`.
        limit: As in `load_records`.
        max_length: Pairs that are longer are left out.
        batch_size: Answers on the device at once.

    Raises:
        CheckpointError: It is no model of rewards.
        DataError: The data cannot be used.
    """
    if task_of(model.config) != REWARD:
        raise CheckpointError(f"{model.name_or_path} is no model of rewards")
    records = load_records(
        data, form="preference", split=split_to_measure(data, split), columns=columns, chat=chat, limit=limit
    )
    examples = prepare(records, tokenizer, max_length=max_length, as_pairs=True).tokenized.examples
    rows = [example.input_ids for example in examples]
    refuse_unfit(rows, model, tokenizer.name_or_path)
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    rewards = torch.empty(len(rows))
    device = model.get_input_embeddings().weight.device
    with inference(model):
        for start in range(0, len(by_length), batch_size):
            taken = by_length[start : start + batch_size]
            ids = padded([rows[i] for i in taken], pad_token(model.config))
            mask = padded([[1] * len(rows[i]) for i in taken], 0)
            scores = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            rewards[taken] = scores[:, 0].float().cpu()
    better, worse = rewards.chunk(2)
    margins = better - worse
    loss, accuracy = -F.logsigmoid(margins).mean().item(), (margins > 0).float().mean().item()
    return RewardResult(loss, accuracy, margins.mean().item(), len(margins))

"""Examples of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from qosora.data.tokens import IGNORED, Example

__all__ = ["batches_by_length", "padded", "padded_batch"]

E = TypeVar("E", bound=Example)


def padded(rows: Sequence[Sequence[int] | np.ndarray], fill: int, *, left: bool = False) -> torch.Tensor:
    """Return rows as one tensor, (rows, longest), int64.

    Args:
        rows: Integers, of any lengths.
        fill: What makes the shorter ones as long as the longest.
        left: Whether to fill on the left, as for generation, and not on the right, as for training.
    """
    width = max(map(len, rows))
    made = np.full((len(rows), width), fill, dtype=np.int64)
    for line, row in zip(made, rows, strict=True):
        start = width - len(row) if left else 0
        line[start : start + len(row)] = row
    return torch.from_numpy(made)


def batches_by_length(examples: Sequence[E], size: int) -> list[list[E]]:
    """Return examples in batches, in the order of their length: the largest batch first, and little padding."""
    by_length = sorted(examples, key=lambda example: -len(example.input_ids))
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def padded_batch(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Return what a model takes, padded on the right: input_ids, labels, attention_mask, (examples, longest), int64."""
    return {
        "input_ids": padded([e.input_ids for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORED),
        "attention_mask": padded([np.ones_like(e.input_ids) for e in examples], 0),
    }

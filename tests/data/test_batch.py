"""Padding: every row whole, on its side, and nothing but the filling beside it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qosora.data.batch import padded, padded_batch
from qosora.data.tokens import IGNORED, Example


@given(
    rows=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), min_size=1, max_size=5),
    fill=st.integers(-100, 5),
    left=st.booleans(),
)
def test_any_rows(rows: list[list[int]], fill: int, left: bool):
    found = padded(rows, fill, left=left)
    assert found.dtype == torch.int64
    width = max(map(len, rows))
    filling = [[fill] * (width - len(row)) for row in rows]
    expected = [more + row if left else row + more for row, more in zip(rows, filling, strict=True)]
    assert found.tolist() == expected


def test_a_batch():
    lengths = (2, 3)
    examples = [
        Example(np.arange(5, 5 + n, dtype=np.int32), np.array([IGNORED, *range(6, 5 + n)], np.int32)) for n in lengths
    ]
    batch = padded_batch(examples)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 0], [5, 6, 7]],
        "labels": [[-100, 6, -100], [-100, 6, 7]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

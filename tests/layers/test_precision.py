"""Which dtype a CPU computes quickly in."""

from __future__ import annotations

import math

import pytest
import torch

from qosora.layers import precision
from qosora.layers.precision import fast_dtype, slowdown

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "times", "expected"),
    [
        (torch.bfloat16, 0.5, torch.bfloat16),
        (torch.bfloat16, 5.0, torch.float32),
        (torch.float16, 60.0, torch.float32),
        (torch.float32, 60.0, torch.float32),
        (torch.float64, 60.0, torch.float64),
    ],
)
def test_what_is_slow_is_left(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, times: float, expected: torch.dtype):
    monkeypatch.setattr(precision, "slowdown", lambda _: times)
    assert fast_dtype(dtype) == expected


@pytest.mark.parametrize("dtype", HALF)
def test_measured_once_and_without_a_trace(dtype: torch.dtype):
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    first = slowdown(dtype)
    assert math.isfinite(first)
    assert first > 0
    assert slowdown(dtype) == first
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)

"""Which device a computation is for: that of its tensors, or for tensors without memory the one that is planned for.

A planner wants the most memory of a computation alone, and has it do no more of equal pieces than that takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["autocast_dtype", "device_type", "peaks_alone", "pieces", "planning_for"]

_T = TypeVar("_T")

#: What tensors on the meta device stand for.
_planned = "meta"
#: Of pieces that are computed in turn, each at most as large as the first, with the third all is live that ever is:
#: what the second left, and the sum of both.
_ENOUGH = 3
_peaks_alone = False


def device_type(tensor: torch.Tensor) -> str:
    """Return "cuda", "cpu" or the like: where a tensor is, or where the one is that it stands for."""
    return _planned if tensor.is_meta else tensor.device.type


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """Return the dtype of products where autocast is on for a tensor's device, or None."""
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


@contextmanager
def planning_for(device: str) -> Iterator[None]:
    """Let tensors on the meta device take the ways that tensors on "cuda" or "cpu" take, in the whole process."""
    global _planned
    before, _planned = _planned, device
    try:
        yield
    finally:
        _planned = before


def pieces(of_all: Sequence[_T]) -> Sequence[_T]:
    """Return the pieces that a computation is to do in turn: all, but under `peaks_alone`."""
    return of_all[:_ENOUGH] if _peaks_alone else of_all


@contextmanager
def peaks_alone() -> Iterator[None]:
    """Let what computes in pieces do as many as its most memory takes: results have no values, nor counts a meaning."""
    global _peaks_alone
    before, _peaks_alone = _peaks_alone, True
    try:
        yield
    finally:
        _peaks_alone = before

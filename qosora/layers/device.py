"""Which device a computation is for: that of its tensors, or for tensors without memory the one that is planned for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["autocast_dtype", "device_type", "planning_for"]

#: What tensors on the meta device stand for.
_planned = "meta"


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

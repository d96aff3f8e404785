"""What stands on the meta device for parts that need real memory: optimizers, QLoRA's 4-bit layer, offloading.

Each allocates what the real part does; tests compare them with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import bitsandbytes
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qosora.compat.bitsandbytes import SMALL_NUMEL, fill_linear4bit
from qosora.compat.torch import foreach_copy_, storage_key
from qosora.compat.trl import offloading_limits
from qosora.decompose import nf4
from qosora.memory.tracer import Tracer
from qosora.training import ALIGNMENT, OPTIMIZERS, PAGED_NUMEL

__all__ = [
    "STASH",
    "FourBitLinear",
    "GroupsStandIn",
    "OffloadingStandIn",
    "PackedStandIn",
    "PerTensorStandIn",
    "state_shapes",
]

#: Bytes from which on TRL offloads a tensor, and the offloaded tensors that are still on their way.
_OFFLOADED_BYTES, STASH = offloading_limits()


def state_shapes(numel: int, optimizer: str, in_all: int | None = None) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and dtypes of what bitsandbytes keeps for `numel` elements of a parameter.

    Args:
        numel: Elements.
        optimizer: One of `OPTIMIZERS`.
        in_all: Elements of the whole parameter, whose size decides about 8 bits; `numel` by default.
    """
    moments = 2 if "adam" in optimizer else 1
    if OPTIMIZERS[optimizer].bits == 32 or (in_all or numel) < SMALL_NUMEL:
        return [((numel,), torch.float32)] * moments
    return [((numel,), torch.uint8), ((-(-numel // 256),), torch.float32)] * moments


class _StandIn:
    """Keeps the states that lie in ordinary memory; paged ones are managed memory, outside of CUDA's allocator."""

    def __init__(self, tracer: Tracer, optimizer: str, paged: bool) -> None:
        self.tracer, self.optimizer, self.paged = tracer, optimizer, paged
        self.states: list[torch.Tensor] = []

    def allocate_states(self, numel: int, in_all: int) -> None:
        """Allocate the states of `numel` elements of a parameter of `in_all`."""
        if self.paged and in_all >= PAGED_NUMEL:
            return
        shapes = state_shapes(numel, self.optimizer, in_all)
        with self.tracer.allocating("optimizer state"):
            tables = len(shapes) // 2 if shapes[0][1] == torch.uint8 and not self.states else 0
            self.states += [torch.zeros(256, device="meta") for _ in range(tables)]  # of the 8-bit values
            self.states += [torch.zeros(shape, dtype=dtype, device="meta") for shape, dtype in shapes]


class PackedStandIn(_StandIn):
    """As a group of `PackedPagedOptimizer`: parameters become windows of a buffer, gradients are gathered into another.

    Args:
        params: Of the group; large ones stay by themselves.
        tracer: Entered.
        optimizer: One of `OPTIMIZERS`.
        paged: Whether the device is one where bitsandbytes pages.
        in_all: Elements of the buffer in the whole model, of which this may be the first layers.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], tracer: Tracer, optimizer: str, paged: bool, in_all: int
    ) -> None:
        super().__init__(tracer, optimizer, paged)
        large = [p for p in params if p.numel() >= PAGED_NUMEL]
        self.params = params = [p for p in params if p.numel() < PAGED_NUMEL]
        lengths = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in params]
        with tracer.allocating("adapter"):
            flat = torch.zeros(sum(lengths), device="meta")
        with tracer.allocating("gradients"):
            self.grad = torch.zeros_like(flat)
        self.views = []
        for p, window, grad in zip(params, torch.split(flat, lengths), torch.split(self.grad, lengths), strict=True):
            p.data = window[: p.numel()].view(p.shape)
            self.views.append(grad[: p.numel()].view(p.shape))
        if params:
            self.allocate_states(flat.numel(), in_all)
        for p in large:
            self.allocate_states(p.numel(), p.numel())

    def step(self) -> None:
        """Gather the gradients."""
        pairs = [(view, p.grad) for view, p in zip(self.views, self.params, strict=True) if p.grad is not None]
        foreach_copy_([view for view, _ in pairs], [grad for _, grad in pairs])
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view


class GroupsStandIn:
    """Several groups' optimizers, as one."""

    def __init__(self, groups: Sequence[PackedStandIn]) -> None:
        self.groups = groups

    def step(self) -> None:
        """Gather all gradients."""
        for group in self.groups:
            group.step()


class PerTensorStandIn(_StandIn):
    """As bitsandbytes' own optimizers: states for each parameter.

    Args:
        params: Parameters.
        tracer: Entered.
        optimizer: One of `OPTIMIZERS`.
        paged: Whether the device is one where bitsandbytes pages.
    """

    def __init__(self, params: Sequence[nn.Parameter], tracer: Tracer, optimizer: str, paged: bool) -> None:
        super().__init__(tracer, optimizer, paged)
        for p in params:
            self.allocate_states(p.numel(), p.numel())

    def step(self) -> None:
        """Do nothing: the updates are in place."""


class FourBitLinear(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' 4-bit layer on the meta device, where its own `Params4bit` cannot be: forward and backward are its.

    Args:
        linear: The layer it replaces.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        stored = nf4.stored_shapes(linear.weight.numel(), 64, True)
        parts = {name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in stored.items()}
        fill_linear4bit(self, parts, linear.weight.shape, linear.weight.dtype)


class OffloadingStandIn(saved_tensors_hooks):
    """As TRL's `OffloadActivations`: saved tensors go to host memory, but the last few, and come back in backward."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        kept = {storage_key(p) for p in params}
        stash: deque[torch.Tensor] = deque(maxlen=STASH)

        def pack(tensor: torch.Tensor) -> Any:
            key = storage_key(tensor)
            moved = any(key == storage_key(t) for t in stash)
            if tensor.nbytes < _OFFLOADED_BYTES or key in kept or moved:
                return tensor
            stash.append(tensor)
            return (tensor.shape, tensor.stride(), tensor.dtype)

        def unpack(saved: Any) -> torch.Tensor:
            if isinstance(saved, torch.Tensor):
                return saved
            stash.clear()
            shape, stride, dtype = saved
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

        super().__init__(pack, unpack)

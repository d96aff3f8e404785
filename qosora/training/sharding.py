"""A frozen base that no GPU holds whole: divided among the processes of a run, or kept in host memory, or both.

torch's `fully_shard` (FSDP2) does it: each decoder layer is a group whose tensors are brought together just before it
computes, the next group's while it does, and dropped after it. What is trained stays whole in every process, so that
`DistributedDataParallel` averages its gradients and the packed optimizer and the checkpoints are as in one process. The
tensors are brought together as they are stored, in 4 bits, and are the same to the bit: so are all gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from qosora.compat.torch import ignore_in_ddp
from qosora.layers import decoder_layers

__all__ = ["group_of_one", "is_sharded", "shard"]


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """Make a process group of this process alone, where there is no group: `fully_shard` works in one."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def shard(model: Any, device: torch.device, *, on_host: bool, whole: tuple[nn.Module, ...] = ()) -> None:
    """Divide the frozen tensors of a model among all processes, layer by layer.

    Args:
        model: A PEFT model in host memory; the same in all processes.
        device: Where this process computes. What is trained is moved there.
        on_host: Whether each process keeps its part in host memory, in pages that a GPU reads by itself.
        whole: Modules of which every process keeps all.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if on_host else OffloadPolicy()
    # `fully_shard` refuses tensors without a dimension; some constants of a layer are such
    ignored = {p for p in model.parameters() if p.requires_grad or p.ndim == 0}
    ignored |= {p for module in whole for p in module.parameters()}
    for p in ignored:
        p.data = p.data.to(device)

    def divide(module: nn.Module) -> None:
        fully_shard(module, mesh=mesh, offload_policy=policy, ignored_params=ignored)

    for layer in decoder_layers(model.get_base_model())[1]:
        divide(layer)
    # The head stays with the root, which is whole throughout a step: the loss reads it without calling it
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    own, heads = set(embeddings.parameters()) - ignored, set(head.parameters())
    if own and heads and not own & heads:  # and not one matrix for both
        divide(embeddings)
    divide(model)
    register_fsdp_forward_method(model, "generate")  # which is not a call of the model, and needs its tensors as well
    ignore_in_ddp(model, [name for name, p in model.named_parameters() if p not in ignored])


def is_sharded(model: nn.Module) -> bool:
    """Say whether `shard` has divided a model."""
    return isinstance(model, FSDPModule)

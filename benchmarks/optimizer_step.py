"""Time of an optimizer's step: qosora's packed one against bitsandbytes' and torch's AdamW, which go tensor by tensor.

The tensors are those that train in a 7B: qosora's vectors, and PEFT's LoRA matrices, in bfloat16 as TRL has them.
`step` is the update alone, with gradients in place. `all` is what an optimizer's layout costs a training step:
gradients that arrive as autograd brings them (taken over where there is none, added where the packed buffer has its
zeros), the update, and `zero_grad`. The ratio is to bitsandbytes' 32-bit AdamW, which QLoRA trains with; on a GPU it is
paged, and so is the packed one.

    python benchmarks/optimizer_step.py --output benchmarks/results/optimizer_step_cpu.json --threads 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import bitsandbytes
import torch
from common import Record, arguments, in_turns
from methods import LORA_RANK, MINIATURE, shape_config

from qosora.config import QosoraConfig
from qosora.memory import StepOptions, TracedModel
from qosora.training import PackedPagedOptimizer

QUESTION = "How long does an optimizer's step take, packed against tensor by tensor?"
AGAINST = "bitsandbytes-32bit"
LEARNING_RATE = 1e-6


def optimizers(device: str) -> dict[str, Callable[[list[torch.nn.Parameter]], Any]]:
    """Return what makes each optimizer of its parameters."""
    paged = {"lr": LEARNING_RATE, "is_paged": device == "cuda"}
    return {
        "packed-32bit": partial(PackedPagedOptimizer, lr=LEARNING_RATE, optimizer="paged_adamw_32bit"),
        "packed-8bit": partial(PackedPagedOptimizer, lr=LEARNING_RATE, optimizer="paged_adamw_8bit"),
        "bitsandbytes-32bit": partial(bitsandbytes.optim.AdamW, optim_bits=32, **paged),
        "bitsandbytes-8bit": partial(bitsandbytes.optim.AdamW, optim_bits=8, **paged),
        "torch-fused": partial(torch.optim.AdamW, lr=LEARNING_RATE, fused=True),
        "torch-foreach": partial(torch.optim.AdamW, lr=LEARNING_RATE, foreach=True),
    }


def trained(shape: str, method: str, rank: int) -> list[torch.Tensor]:
    """Return the parameters that a method trains, on the meta device."""
    options = StepOptions(method=method, lora_rank=LORA_RANK)
    model = TracedModel(shape_config(shape), QosoraConfig(rank=rank), options, full_depth=True).model
    return [p for p in model.parameters() if p.requires_grad]


class Trainer:
    """Parameters, the gradients that they get at every step, and their optimizer."""

    def __init__(
        self, like: Sequence[torch.Tensor], make: Callable[[list[torch.nn.Parameter]], Any], device: str
    ) -> None:
        self.params = [torch.nn.Parameter(torch.randn_like(p, device=device)) for p in like]
        self.gradients = [torch.randn_like(p) for p in self.params]
        self.optimizer = make(self.params)
        self.accumulate()

    def accumulate(self) -> None:
        """Bring gradients to where the optimizer wants them, as autograd does."""
        for p, gradient in zip(self.params, self.gradients, strict=True):
            if p.grad is None:
                p.grad = gradient
            else:
                p.grad.add_(gradient)

    def all(self) -> None:
        """Do all that depends on how the optimizer holds its tensors."""
        self.accumulate()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def states(self) -> dict[str, Any]:
        """Return bytes of the optimizer's states, and of those in managed memory, outside the allocator's count."""
        if isinstance(self.optimizer, PackedPagedOptimizer):
            memory = self.optimizer.memory()
            return {"state_bytes": memory.state_bytes, "paged_bytes": memory.paged_bytes}
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = {t.data_ptr(): t for t in states if isinstance(t, torch.Tensor)}.values()  # code tables are shared
        return {
            "state_bytes": sum(t.nbytes for t in tensors),
            "paged_bytes": sum(t.nbytes for t in tensors if getattr(t, "is_paged", False)),
        }


def first_step(trainer: Trainer, device: str) -> dict[str, Any]:
    """Make the states; on a GPU say what the allocator gave for them, and count the kernels of the second step."""
    if device != "cuda":
        trainer.optimizer.step()
        return trainer.states()
    before = torch.cuda.memory_allocated()
    trainer.optimizer.step()
    allocated = torch.cuda.memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.optimizer.step()
        torch.cuda.synchronize()
    kernels = sum(event.device_type.name == "CUDA" for event in profiler.events())
    return {**trainer.states(), "allocated_bytes": allocated, "kernels": kernels}


def measure(args: argparse.Namespace, method: str, rounds: int) -> dict[str, Any]:
    """Time all optimizers on what one method trains."""
    torch.manual_seed(0)
    like = trained(args.shape, method, args.rank)
    trainers = {name: Trainer(like, make, args.device) for name, make in optimizers(args.device).items()}
    memory = {name: first_step(trainer, args.device) for name, trainer in trainers.items()}
    actions = {name: trainer.optimizer.step for name, trainer in trainers.items()}
    step = in_turns(actions, rounds, against=AGAINST)
    for trainer in trainers.values():
        trainer.optimizer.zero_grad()
    everything = in_turns({name: t.all for name, t in trainers.items()}, rounds, against=AGAINST)
    return {
        "tensors": len(like),
        "parameters": sum(p.numel() for p in like),
        "largest": max(p.numel() for p in like),
        "dtype": str(like[0].dtype).removeprefix("torch."),
        "memory": memory,
        "step": step,
        "all": everything,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--shape", default="llama-2-7b", metavar="NAME[:LAYERS]", help="of the model")
    parser.add_argument("--rank", type=int, default=128, help="of qosora's factors (default: 128)")
    parser.add_argument("--rounds", type=int, default=25, help="with qosora's vectors (default: 25)")
    parser.add_argument("--lora-rounds", type=int, default=5, help="with LoRA's matrices, 29 times as many parameters")
    args = arguments(parser, shape=MINIATURE, rounds=2, lora_rounds=2)
    config = {"shape": args.shape, "rank": args.rank, "lora_rank": LORA_RANK}
    record = Record(args.output, "optimizer_step", QUESTION, config, args.resume)
    record.stage("qosora", partial(measure, args, "qosora", args.rounds))
    record.stage("lora", partial(measure, args, "qlora", args.lora_rounds))


if __name__ == "__main__":
    main()

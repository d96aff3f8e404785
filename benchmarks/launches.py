"""How many kernels does a training step launch, against PEFT QLoRA and frozen NF4 alone? Counted on the meta device.

    python benchmarks/launches.py --output benchmarks/results/launches.json

On a small batch a step's time is that of its launches: each operation costs the host 10 to 60 microseconds, whatever it
does. Counted is every operation that would run a kernel on a GPU: not views, nor allocations. A decoder layer's count
is the difference between models of three and of two.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from common import Record
from methods import shape_config
from torch.utils._python_dispatch import TorchDispatchMode

from qosora.config import QosoraConfig
from qosora.layers import experts, fused, ops
from qosora.memory import Batch, StepOptions, TracedModel, training_step
from qosora.memory.meta_kernels import MetaKernels, computing_as

QUESTION = "How many kernels does a training step launch, against PEFT QLoRA?"
SHAPE = "llama-2-7b"
MIXTURE = "qwen3-30b-a3b"
#: Of a mixture PEFT's way has no experts in 4 bits, so there is no QLoRA to count.
METHODS = {SHAPE: ("qosora", "qosora-plain", "qlora"), MIXTURE: ("qosora", "qosora-alone")}
#: Operations that allocate or look at memory, and run nothing.
NOTHING = ("empty", "detach", "alias", "_unsafe_view", "_local_scalar_dense", "is_same_size")
#: Launches of an operation that makes several: for many rows bitsandbytes decodes absmax, adds its offset, decodes the
#: weight, and calls cuBLAS.
SEVERAL = {"gemm_4bit": 4}


class Launches(TorchDispatchMode):
    """Counts operations on meta tensors that would launch a kernel.

    Args:
        counts: By operation, written.
    """

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts
        self._run = MetaKernels(answer=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        name = func._schema.name.partition("::")[2]
        if not func.is_view and not any(part in name for part in NOTHING):
            self.counts[name] += SEVERAL.get(name, 1)
        return self._run(func, args, kwargs or {})


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the launches of a GPU, of operations and of fused kernels."""
    counts: Counter[str] = Counter()
    launch = ops._launch

    def counted(kernel: str, *args: Any, **options: Any) -> None:
        counts[f"fused {kernel}"] += 1
        launch(kernel, *args, **options)

    with computing_as("cuda"), patch.object(ops, "_launch", counted), Launches(counts):
        yield counts


def step_launches(method: str, shape: str, *, checkpointing: bool, tokens: int) -> Counter[str]:
    """Return the launches of forward and backward of a model, by operation.

    Args:
        method: "qlora", "qosora", "qosora-plain" without fused kernels, or "qosora-alone", each expert by itself.
        shape: NAME:LAYERS.
        checkpointing: Whether layers are.
        tokens: Of the one sequence. All experts have as many.
    """
    options = StepOptions(method="qlora" if method == "qlora" else "qosora", gradient_checkpointing=checkpointing)
    model = TracedModel(shape_config(shape), QosoraConfig(), options, full_depth=True)
    with torch.device("meta"):
        inputs = Batch(1, tokens).tensors(model.vocab, "meta")
    alone = patch.object(experts, "_together", lambda x: False) if method == "qosora-alone" else nullcontext()
    even = patch.object(experts, "hardest", even_shares)
    with fused(False) if method == "qosora-plain" else nullcontext(), alone, even, counting() as counts:
        training_step(model.model, inputs, SimpleNamespace(step=lambda: None), max_grad_norm=0)
    return counts


def even_shares(tokens: int, top_k: int, num_experts: int) -> list[int]:
    """Give all experts as many tokens."""
    share, more = divmod(tokens * top_k, num_experts)
    return [share + (i < more) for i in range(num_experts)]


def of_a_layer(method: str, *, checkpointing: bool, shape: str = SHAPE, tokens: int = 2048) -> Counter[str]:
    """Return the launches of one decoder layer's part of a step."""
    # The first makes what is made once in a process, such as the tables of codes.
    _, two, three = (
        step_launches(method, f"{shape}:{n}", checkpointing=checkpointing, tokens=tokens) for n in (2, 2, 3)
    )
    return Counter({name: three[name] - two[name] for name in three if three[name] != two[name]})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--resume", action="store_true", help="keep the stages that the output holds")
    args = parser.parse_args()
    record = Record(
        args.output,
        "launches",
        QUESTION,
        {"shape": SHAPE, "mixture": MIXTURE, "tokens": 2048, "rank": 128},
        args.resume,
    )
    for checkpointing in (True, False):
        for shape, methods in METHODS.items():
            for method in methods:

                def count(method: str = method, checkpointing: bool = checkpointing, shape: str = shape) -> Any:
                    counts = of_a_layer(method, checkpointing=checkpointing, shape=shape)
                    return {"launches": counts.total(), "by_operation": dict(counts.most_common())}

                name = method if shape == SHAPE else f"{shape}_{method}"
                record.stage(f"{name}_{'checkpointed' if checkpointing else 'kept'}", count)


if __name__ == "__main__":
    main()

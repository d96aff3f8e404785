"""Time of forward and backward of one linear layer: qosora against a frozen NF4 layer and PEFT's adapters on it.

All are made by PEFT, take a batch that needs gradients, and run in turns; what counts is the ratio to the frozen NF4
layer in the same round. Tables and this file's figures are medians.

    python benchmarks/layer_step.py --output benchmarks/results/layer_step_cpu.json --threads 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Record, arguments, in_turns
from methods import LORA_RANK, MINIATURE, VERA_RANK, layer, layer_shapes
from torch import nn

QUESTION = "How long do forward and backward of a linear layer take, against the frozen NF4 layer alone?"
METHODS = ("nf4", "plain", "qosora-64", "qosora-128", "qosora-256", "lora", "dora", "vera")


def step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Callable[[], None]:
    """Return what is timed: forward, backward, and forgetting the gradients."""

    def run() -> None:
        model(x).backward(g)
        model.zero_grad()
        x.grad = None

    return run


def measure(args: argparse.Namespace, shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """Time all methods at one shape."""
    out_features, in_features = shape
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    x = torch.randn(1, tokens, in_features, dtype=dtype, device=args.device).requires_grad_()
    g = torch.randn(1, tokens, out_features, dtype=dtype, device=args.device)
    steps = {m: step(layer(m, out_features, in_features, dtype, args.device), x, g) for m in args.methods}
    return in_turns(steps, args.rounds, against="nf4", warmup=args.warmup)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument(
        "--models", nargs="+", default=["llama-2-7b", "llama-3.1-8b"], help="whose linear layers are taken"
    )
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="only layers of these shapes (default: all)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 2048, 8192])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="with nf4, which the others are compared with")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1)
    return arguments(parser, models=[MINIATURE], tokens=[1, 8], rounds=2)


def main() -> None:
    """Run the benchmark."""
    args = parse()
    models = {name: layer_shapes(name) for name in args.models}
    config = {
        "dtype": args.dtype,
        "rounds": args.rounds,
        "lora_rank": LORA_RANK,
        "vera_rank": VERA_RANK,
        "layers": models,
    }
    record = Record(args.output, "layer_step", QUESTION, config, args.resume)
    for shape in args.shapes or sorted({shape for counts in models.values() for shape in counts}):
        out_features, _, in_features = shape.partition("x")
        for tokens in args.tokens:
            sizes = (int(out_features), int(in_features))
            record.stage(f"{shape}_{tokens}", partial(measure, args, sizes, tokens))


if __name__ == "__main__":
    main()

"""Time and peak memory of a whole model's training step: qosora against PEFT QLoRA, in turns.

The step is the trainer's: forward, TRL's chunked loss, backward, clipping, optimizer. QLoRA is PEFT's LoRA, r=16, on
all linear layers, in bitsandbytes' NF4 with double quantization. Weights and tokens are random. Each model's peak is
measured while it is alone, by CUDA's own count or as live tensor bytes on a CPU; then all stand side by side for the
turns, so that the device must hold them all.

    python benchmarks/train_step.py --output benchmarks/results/train_step_cpu.json --threads 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import Record, arguments, in_turns
from methods import LORA_RANK, MINIATURE, OPTIMIZER, Training, release, shape_config

from qosora.memory import Batch, StepOptions

QUESTION = "How long does a training step take, and how much memory, against PEFT QLoRA?"
COMPILED = "qosora-compiled"


def run(
    args: argparse.Namespace, shape: str, batch: Batch, checkpointing: bool, methods: Sequence[str]
) -> dict[str, Any]:
    """Measure methods at one setting. A compiled one comes first: its peak is measured where it is timed."""
    config, counters = shape_config(shape), torch._dynamo.utils.counters
    counters.clear()

    def build(method: str) -> Training:
        step = StepOptions(
            method=method.removesuffix("-compiled"),
            gradient_checkpointing=checkpointing,
            optimizer=OPTIMIZER,
            device=args.device,
            precision=args.precision,
        )
        torch.manual_seed(0)
        return Training(config, step, batch, args.rank, compiled=method == COMPILED)

    peaks: dict[str, int | None] = {}
    trainings: dict[str, Training] = {}
    for method in methods:
        if method != COMPILED:
            training = build(method)
            peaks[method] = training.peak_bytes()
            if args.device == "cpu":  # where only the tensors of the model that is traced count
                trainings[method] = training
            del training
            release()
    for method in methods:
        if method not in trainings:
            trainings[method] = build(method)
        if method == COMPILED:  # the tracer that counts on a CPU would see no compiled kernel
            peaks[method] = trainings[method].peak_bytes() if args.device == "cuda" else None
    timings = in_turns({m: t.step for m, t in trainings.items()}, args.rounds, against="qlora", warmup=args.warmup)
    trainings.clear()
    release()
    breaks = sum(sum(counters[kind].values()) for kind in ("graph_break", "unimplemented"))
    graphs = {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}
    found: dict[str, dict[str, Any]] = {
        method: {
            **timings[method],
            "tokens_per_second": round(batch.tokens / timings[method]["seconds"]["median"], 1),
            "peak_bytes": peaks[method],
        }
        for method in methods
    }
    rival = found["qlora"]
    return {
        "batch_size": batch.size,
        "tokens": batch.length,
        **(graphs if COMPILED in methods else {}),
        **found,
        "over_qlora": {
            method: {
                "tokens_per_second": round(1 / result["ratio"]["median"], 4),
                "peak_bytes": result["peak_bytes"] and round(result["peak_bytes"] / rival["peak_bytes"], 4),
            }
            for method, result in found.items()
            if method != "qlora"
        },
    }


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME[:LAYERS]", help="shapes, whole or their first layers",
        default=["llama-2-7b:2", "llama-3.1-8b:1"],
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--compile", action="store_true", help="qosora with its decoder layers compiled")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    return arguments(parser, shapes=[MINIATURE], tokens=[32], rank=8, rounds=2)


def main() -> None:
    """Run the benchmark."""
    args = parse()
    config = {
        "rank": args.rank,
        "lora_rank": LORA_RANK,
        "optimizer": OPTIMIZER,
        "precision": args.precision,
        "rounds": args.rounds,
    }
    record = Record(args.output, "train_step", QUESTION, config, args.resume)
    methods = (COMPILED, "qlora") if args.compile else ("qosora", "qlora")
    for checkpointing in [choice == "on" for choice in args.checkpointing]:
        how = ("checkpointed" if checkpointing else "kept") + "_compiled" * args.compile
        for shape in args.shapes:
            for tokens in args.tokens:
                for size in args.batch_sizes:
                    name = f"{shape}_{size}x{tokens}_{how}"
                    record.stage(name, partial(run, args, shape, Batch(size, tokens), checkpointing, methods))


if __name__ == "__main__":
    main()

"""Peak memory of the real training step: qosora against PEFT QLoRA at the same settings, and both against the plan.

QLoRA is PEFT's LoRA, r=16, on all linear layers, in bitsandbytes' NF4 with double quantization. Both train in bfloat16
with TRL's chunked loss, transformers' checkpointing and PyTorch's attention. The weights are random: memory does not
depend on them. Without a GPU what is measured are live tensor bytes on the CPU, for a shape's first layers only where
all would take too long. With one, it is `torch.cuda.max_memory_allocated` of steps as they are, beside that of each
phase of a traced step, and what lies outside of it: reserved memory, cuBLAS' workspaces, the context.

    python benchmarks/memory.py --output benchmarks/results/memory_cpu.json --threads 2
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from common import Record, arguments
from methods import LORA_RANK, MINIATURE, OPTIMIZER, Training, release, shape_config

from qosora.config import QosoraConfig
from qosora.memory import LASTING, Batch, StepOptions, TracedModel, model_config, the_card, usage_of
from qosora.memory.plan import plan

QUESTION = "How much memory does a training step take at its peak, against PEFT QLoRA, and is it what was planned?"


def run(args: argparse.Namespace, shape: str, tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Measure both methods at one setting, one model at a time."""
    config, batch, found = shape_config(shape), Batch(1, tokens), {}
    for method in ("qosora", "qlora"):
        step = StepOptions(
            method=method,
            gradient_checkpointing=checkpointing,
            optimizer=OPTIMIZER,
            device=args.device,
            precision=args.precision,
        )  # fmt: skip
        training = Training(config, step, batch, args.rank)
        measured = training.measured(args.steps)
        cuda = training.cuda_memory() if args.device == "cuda" else {}
        del training
        release()
        live = measured["live"]
        peak = cuda.get("allocated_bytes", live.allocated_bytes)
        planned = usage_of(
            TracedModel(config, QosoraConfig(rank=args.rank), step).predict(batch), the_card(), args.device
        )
        found[method] = {
            "peak_bytes": peak,
            "planned_bytes": planned.allocated_bytes,
            "planned_over_measured": round(planned.allocated_bytes / peak, 5),
            "live_by_category": live.rows,
            "live_by_phase": live.phases,
            "planned_by_category": planned.rows,
            "planned_by_phase": planned.phases,
            "attention": sorted({event.op for event in measured["events"] if "attention" in event.op}),
            "allocated_by_phase": measured["allocated_bytes"],
            "cuda": cuda,
            "step_seconds": round(measured["step_seconds"], 3),
        }
    ratio = found["qosora"]["peak_bytes"] / found["qlora"]["peak_bytes"]
    step_bytes = {
        method: result["peak_bytes"] - sum(v for k, v in result["live_by_category"].items() if k in LASTING)
        for method, result in found.items()
    }
    return {
        "layers": config.num_hidden_layers,
        "tokens": tokens,
        **found,
        "qosora_over_qlora": round(ratio, 4),
        "qosora_over_qlora_without_what_lasts": round(step_bytes["qosora"] / step_bytes["qlora"], 4),
    }


def predicted(args: argparse.Namespace, shape: str, tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Plan the whole model for a GPU."""
    found = plan(
        shape, batch_size=1, seq_len=tokens, rank=args.rank, gradient_checkpointing=checkpointing, grid=False,
        gpu="RTX 4090",
    )  # fmt: skip
    assert found.qlora is not None
    return {
        "tokens": tokens,
        "qosora_allocated_bytes": found.usage.allocated_bytes,
        "qlora_allocated_bytes": found.qlora.allocated_bytes,
        "qosora_over_qlora": round(found.usage.allocated_bytes / found.qlora.allocated_bytes, 4),
    }


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME[:LAYERS]", help="shapes, whole or their first layers",
        default=["tinyllama-1.1b", "llama-2-7b:2", "llama-3.1-8b:2"],
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=0, help="steps to time, after the first")
    return arguments(parser, shapes=[MINIATURE], tokens=[32], rank=8)


def main() -> None:
    """Run the benchmark."""
    args = parse()
    config = {
        "rank": args.rank,
        "lora_rank": LORA_RANK,
        "optimizer": OPTIMIZER,
        "precision": args.precision,
        "batch_size": 1,
    }
    record = Record(args.output, "memory", QUESTION, config, args.resume)
    for checkpointing in [choice == "on" for choice in args.checkpointing]:
        how = "checkpointed" if checkpointing else "kept"
        for shape in args.shapes:
            for tokens in args.tokens:
                record.stage(f"measured_{shape}_{tokens}_{how}", partial(run, args, shape, tokens, checkpointing))
        for shape in () if args.miniature or args.device == "cuda" else ("llama-2-7b", "llama-3.1-8b"):
            for tokens in (2048, 8192):
                if tokens <= model_config(shape).max_position_embeddings:
                    record.stage(
                        f"planned_{shape}_{tokens}_{how}", partial(predicted, args, shape, tokens, checkpointing)
                    )


if __name__ == "__main__":
    main()

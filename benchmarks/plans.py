"""What does a step of fine-tuning take, by the plan? Models of 8B to 70B, options that save memory, QLoRA beside.

    python benchmarks/plans.py --output benchmarks/results/plans.json

Everything is planned for a consumer card, traced on the meta device: nothing is measured here; `memory.py` measures
what the plan says. Batch size 1, gradient checkpointing, TRL's chunked loss, for both methods. "tensors" is what
PyTorch allocates, "in_all" has the allocator's overhead and the CUDA context, as `qosora plan` assumes them.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from common import Record, arguments
from methods import LORA_RANK, MINIATURE, shape_config

from qosora.memory import Usage
from qosora.memory.plan import plan

QUESTION = "What does a step of fine-tuning take, by the plan, against PEFT QLoRA?"
#: Options that save memory, by what the results call them: what `plan` takes; and QLoRA's name where it is planned.
WAYS: dict[str, tuple[dict[str, Any], str | None]] = {
    "qosora": ({}, "qlora"),
    "embeddings_4bit": ({"embeddings": "4bit"}, None),
    "embeddings_4bit_host": ({"embeddings": "4bit", "base_on": "host"}, None),
    "embeddings_4bit_offloading": ({"embeddings": "4bit", "activation_offloading": True}, "qlora_offloading"),
}


def planned(args: argparse.Namespace, model: str, tokens: int) -> dict[str, Any]:
    """Plan a model in all ways."""
    found: dict[str, Any] = {"tokens": tokens}
    for way, (options, rival) in WAYS.items():
        one = plan(
            shape_config(model),
            batch_size=1,
            seq_len=tokens,
            rank=args.rank,
            grid=False,
            compare=rival is not None,
            **options,
        )
        found[way] = _bytes(one.usage)
        if rival is not None and one.qlora is not None:
            found[rival] = _bytes(one.qlora)
    return found


def _bytes(usage: Usage) -> dict[str, Any]:
    return {"tensors": usage.allocated_bytes, "in_all": usage.total_bytes, "rows": usage.rows}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument(
        "--models", nargs="+", metavar="SHAPE",
        default=["llama-3.1-8b", "qwen3-14b", "qwen3-32b", "llama-3.1-70b", "gemma-3-4b"],
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rank", type=int, default=128)
    args = arguments(parser, models=[MINIATURE], tokens=[64], rank=8)
    record = Record(args.output, "plans", QUESTION, {"rank": args.rank, "lora_rank": LORA_RANK}, args.resume)
    for model in args.models:
        for tokens in args.tokens:
            if tokens <= shape_config(model).max_position_embeddings:
                record.stage(f"{model}_{tokens}", partial(planned, args, model, tokens))


if __name__ == "__main__":
    main()

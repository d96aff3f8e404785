"""Time and peak memory of a mixture's training step: experts computed together, one by one, and by PEFT's way.

Experts are computed together on a GPU, and one by one on a CPU, where that is faster: here both are measured. PEFT's
way is QLoRA: LoRA, r=16, on linear layers in bitsandbytes' NF4, and by `target_parameters` on the tensors that
stack the experts, which stay in 16 bits. The model is one decoder layer with random weights and a small vocabulary.
Each method stands alone while its peak is measured, by CUDA's own count or as live tensor bytes on a CPU; for the
turns all do.

    python benchmarks/mixture_step.py --output benchmarks/results/mixture_step_cpu.json --precision fp32 --threads 2
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from common import Record, arguments, in_turns
from methods import LORA_RANK, MINIATURE, OPTIMIZER, Training, release, shape_config
from transformers import PreTrainedConfig, Qwen3MoeConfig

from qosora.layers import experts
from qosora.memory import Batch, StepOptions

QUESTION = "How long does a mixture's training step take, and how much memory, against PEFT's way?"
SHAPE, VOCABULARY = "qwen3-30b-a3b", 1024
TOGETHER, ALONE, RIVAL = "qosora, together", "qosora, expert by expert", "qlora"


def config_of(shape: str) -> PreTrainedConfig:
    """Return the config of one decoder layer."""
    if shape == MINIATURE:
        config: PreTrainedConfig = Qwen3MoeConfig(
            hidden_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        )  # fmt: skip
    else:
        config = shape_config(f"{shape}:1")
    config.vocab_size = VOCABULARY
    return config


def run(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Measure all methods at one length."""
    config, batch = config_of(args.shape), Batch(1, tokens)

    def build(method: str) -> Training:
        step = StepOptions(
            method="qlora" if method == RIVAL else "qosora",
            gradient_checkpointing=False,
            optimizer=OPTIMIZER,
            device=args.device,
            precision=args.precision,
        )
        torch.manual_seed(0)
        return Training(config, step, batch, args.rank)

    def how(method: str) -> AbstractContextManager[Any]:
        return patch.object(experts, "_together", lambda x: method == TOGETHER)

    def step(method: str) -> None:
        with how(method):
            trainings[method].step()

    peaks: dict[str, int] = {}
    for method in (TOGETHER, ALONE, RIVAL):
        with how(method):
            peaks[method] = build(method).peak_bytes()
        release()
    trainings = {method: build(method) for method in (TOGETHER, RIVAL)}
    trainings[ALONE] = trainings[TOGETHER]
    steps = {method: partial(step, method) for method in (TOGETHER, ALONE, RIVAL)}
    timings = in_turns(steps, args.rounds, against=RIVAL, warmup=args.warmup)
    return {"tokens": tokens, **{m: {**timings[m], "peak_bytes": peaks[m]} for m in timings}}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    args = arguments(parser, shape=MINIATURE, tokens=[32], rank=8, rounds=2)
    config = {"shape": args.shape, "vocabulary": VOCABULARY, "rank": args.rank, "lora_rank": LORA_RANK}
    record = Record(args.output, "mixture_step", QUESTION, config | {"precision": args.precision}, args.resume)
    for tokens in args.tokens:
        record.stage(f"{args.shape}_{tokens}", partial(run, args, tokens))


if __name__ == "__main__":
    main()

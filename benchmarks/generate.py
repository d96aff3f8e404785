"""Speed of greedy decoding from a 4-bit base: qosora, its adapter apart or merged, against PEFT's LoRA on NF4.

All keep a KV cache and run in turns. `prefill` reads the prompts and yields the first token; `decode` yields the ones
after it, one by one. The weights are random: the time does not depend on them. Where all layers would take too long, a
shape's first ones stand for it.

    python benchmarks/generate.py --output benchmarks/results/generate_cpu.json --threads 2 --prompt-tokens 128 --rounds 3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from common import Record, Timings, arguments, in_turns
from methods import LORA_RANK, MINIATURE, generator, shape_config
from transformers import PreTrainedModel

QUESTION = "How fast does a 4-bit model with an adapter generate, against PEFT's LoRA on NF4?"
METHODS = ("lora", "nf4", "qosora", "qosora-merged")


def prefill(model: PreTrainedModel, prompts: torch.Tensor) -> Any:
    """Read prompts (batch, tokens); return the last position's logits and the cache."""
    return model(input_ids=prompts, use_cache=True, logits_to_keep=1)


def decode(model: PreTrainedModel, start: Any, new_tokens: int) -> torch.Tensor:
    """Write tokens after what `prefill` has read, and leave its cache as it was. Returns them, (batch, new_tokens)."""
    cache, written = start.past_key_values, [start.logits[:, -1:].argmax(-1)]
    for _ in range(new_tokens):
        logits = model(input_ids=written[-1], past_key_values=cache, use_cache=True).logits
        written.append(logits[:, -1:].argmax(-1))
    cache.crop(-new_tokens)
    return torch.cat(written[1:], 1)


@lru_cache(maxsize=1)
def models(shape: str, precision: str, device: str, rank: int) -> dict[str, PreTrainedModel]:
    """Return the models of a shape, all at once."""
    torch.manual_seed(0)
    return {method: generator(method, shape_config(shape), precision, device, rank) for method in METHODS}


@torch.no_grad()
def measure(args: argparse.Namespace, shape: str, batch: int) -> dict[str, Any]:
    """Time all methods on one batch."""
    made = models(shape, args.precision, args.device, args.rank)
    config = shape_config(shape)
    prompts = torch.randint(0, config.vocab_size, (batch, args.prompt_tokens), device=args.device)
    reading: Mapping[str, Callable[[], Any]] = {name: partial(prefill, model, prompts) for name, model in made.items()}
    prefilled = in_turns(reading, args.rounds, against="lora")
    starts = {name: read() for name, read in reading.items()}
    writing = {name: partial(decode, model, starts[name], args.new_tokens) for name, model in made.items()}
    decoded = in_turns(writing, args.rounds, against="lora")
    return {
        "shape": shape.partition(":")[0],
        "layers": config.num_hidden_layers,
        "batch_size": batch,
        "prefill": prefilled,
        "decode": decoded,
        "tokens_per_second": {
            "prefill": rates(prefilled, batch * args.prompt_tokens),
            "decode": rates(decoded, batch * args.new_tokens),
        },
    }


def rates(timings: Timings, tokens: int) -> dict[str, float]:
    """Return tokens per second at the median."""
    return {name: float(f"{tokens / found['seconds']['median']:.4g}") for name, found in timings.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    shapes = ["llama-2-7b" if torch.cuda.is_available() else "llama-2-7b:2"]
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME[:LAYERS]", default=shapes, help="whole, or their first layers"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=128, help="of qosora's factors (default: 128)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    args = arguments(parser, shapes=[MINIATURE], batch_sizes=[1, 2], prompt_tokens=16, new_tokens=3, rounds=2)
    names = ("prompt_tokens", "new_tokens", "rank", "precision", "rounds")
    config = {**{name: getattr(args, name) for name in names}, "lora_rank": LORA_RANK}
    record = Record(args.output, "generate", QUESTION, config, args.resume)
    for shape in args.shapes:
        for batch in args.batch_sizes:
            record.stage(f"{shape}_{batch}", partial(measure, args, shape, batch))


if __name__ == "__main__":
    main()

"""What trains in a process that may take little GPU memory, and how long the longest sequence is.

The process is held to a size by `torch.cuda.set_per_process_memory_fraction`, less what the CUDA context takes, so
that all of it would fit a card of that size. Weights and tokens are random, the steps are the trainer's. The longest
sequence is searched with activations offloaded to host memory: two short ones tell how the peak grows, then those at
which it meets the limit are tried. On a CPU the limit is held against live tensor bytes.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/gpu/limits.py --output limits.json
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Record, arguments
from methods import MINIATURE, OPTIMIZER, Training, release, shape_config

from qosora.config import QosoraConfig
from qosora.memory import Batch, StepOptions, TracedModel, the_card, usage_of

QUESTION = "What trains in a process that may take only so much GPU memory?"
GIB = 2**30


class Limit:
    """Holds the process to a size.

    Args:
        total_bytes: That it may take, the CUDA context included.
        device: "cuda", or "cpu" to compare live tensor bytes with it.
    """

    def __init__(self, total_bytes: int, device: str) -> None:
        self.total_bytes, self.device, self.context_bytes = total_bytes, device, 0
        if device == "cuda":
            warm_up()
            release()
            free, total = torch.cuda.mem_get_info()
            self.context_bytes = total - free - torch.cuda.memory_reserved()
            torch.cuda.set_per_process_memory_fraction((total_bytes - self.context_bytes) / total)

    def peak(self, training: Training, batch: Batch) -> dict[str, Any]:
        """Run a step on a batch; return whether it fits, and what it took."""
        release()
        if self.device == "cpu":
            training.load(batch)
            peak = training.peak_bytes()
            return {"fits": peak <= self.total_bytes, "peak_bytes": peak}
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            training.load(batch)
            loss = float(training.step())
        except torch.OutOfMemoryError as error:
            training.model.zero_grad()
            return {"fits": False, "error": str(error).partition("\n")[0][:300]}
        free, total = torch.cuda.mem_get_info()
        return {
            "fits": True,
            "loss": loss,
            "step_seconds": round(time.perf_counter() - start, 3),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_used_bytes": total - free,
        }


def warm_up() -> None:
    """Let CUDA load the kernels of a step: its context grows with them."""
    training = Training(shape_config(MINIATURE), StepOptions(optimizer=OPTIMIZER), Batch(2, 128), rank=8)
    training.step()
    torch.cuda.synchronize()


def options(device: str, *, offloading: bool = False) -> StepOptions:
    """Return the trainer's defaults; offloading needs a GPU."""
    return StepOptions(optimizer=OPTIMIZER, device=device, activation_offloading=offloading and device == "cuda")


def trains(args: argparse.Namespace, shape: str, batch: Batch, limit_bytes: int) -> dict[str, Any]:
    """Train for some steps within a limit."""
    limit, config, step = Limit(limit_bytes, args.device), shape_config(shape), options(args.device)
    training = Training(config, step, batch, args.rank)
    steps = [limit.peak(training, batch) for _ in range(3)]
    del training
    release()
    planned = usage_of(TracedModel(config, QosoraConfig(rank=args.rank), step).predict(batch), the_card(), args.device)
    losses = [found["loss"] for found in steps if "loss" in found]
    return {
        "limit_bytes": limit_bytes,
        "context_bytes": limit.context_bytes,
        "fits": all(found["fits"] and found.get("device_used_bytes", 0) <= limit_bytes for found in steps)
        and all(map(math.isfinite, losses)),
        "planned_bytes": planned.total_bytes,
        "planned_verdict": planned.verdict(limit_bytes),
        "steps": steps,
    }


def next_length(found: Mapping[int, Mapping[str, Any]], unit: int, most: int) -> int | None:
    """Return the next length to try, in whole units; None when the longest that fits is known to a unit.

    Args:
        found: What lengths took that were tried, at least two of them.
        unit: Of lengths.
        most: The longest.
    """
    fitting = sorted(length for length, result in found.items() if result["fits"])
    low = max(fitting, default=0)
    high = min((length for length, result in found.items() if not result["fits"]), default=most + unit)
    guess = high - unit
    if len(fitting) >= 2 and high > most:  # where the peak meets the limit, if it goes on growing as it does
        first, second = (found[length]["peak_bytes"] for length in fitting[-2:])
        slope = (second - first) / (fitting[-1] - fitting[-2])
        room = found[low]["limit_bytes"] - second
        guess = low + int(room / slope) if slope > 0 else guess
    elif high <= most:
        guess = (low + 3 * high) // 4  # what fits takes the most time, and more than one that does not
    guess = min(max(guess // unit * unit, low + unit), high - unit)
    return guess if low < guess < high else None


def search(
    probe: Callable[[int], dict[str, Any]], first: tuple[int, int], unit: int, most: int, seconds: float
) -> dict[int, dict[str, Any]]:
    """Try lengths until the longest that fits is known, or time is up; return what each took."""
    end, found = time.monotonic() + seconds, {length: probe(length) for length in first}
    while (length := next_length(found, unit, most)) is not None and time.monotonic() < end:
        found[length] = probe(length)
    return found


def context(args: argparse.Namespace, record: Record) -> None:
    """Find the longest sequence within the limit."""
    config, shape = shape_config(args.context_shape), args.context_shape
    limit, step = Limit(args.context_bytes, args.device), options(args.device, offloading=True)
    training = Training(config, step, Batch(1, args.first[0]), args.rank)

    def probe(length: int) -> dict[str, Any]:
        return record.stage(
            f"probe_{shape}_{length}",
            lambda: {"limit_bytes": limit.total_bytes - limit.context_bytes, **limit.peak(training, Batch(1, length))},
        )

    found = search(probe, args.first, args.unit, config.max_position_embeddings, args.seconds)
    fitting = [length for length in found if found[length]["fits"]]
    failing = [length for length in found if not found[length]["fits"]]
    longest = max(fitting, default=0)

    def planned() -> dict[str, Any]:
        traced = TracedModel(config, QosoraConfig(rank=args.rank), step)
        usage = usage_of(traced.predict(Batch(1, longest)), the_card(), args.device)
        return {"planned_bytes": usage.allocated_bytes, "planned_total_bytes": usage.total_bytes}

    record.stage(
        f"context_{shape}",
        lambda: {
            "limit_bytes": args.context_bytes,
            "context_bytes": limit.context_bytes,
            "activation_offloading": step.activation_offloading,
            "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
            "positions": config.max_position_embeddings,
            "longest": longest,
            "shortest_that_does_not_fit": min(failing, default=None),
            **(found[longest] if longest else {}),
            **(planned() if longest else {}),
        },
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--only", choices=("trains", "context"), help="(default: both)")
    parser.add_argument("--context-shape", default="llama-3.1-8b", help="whose longest sequence is searched")
    parser.add_argument("--seconds", type=float, default=80, help="after which the search begins no other length")
    parser.add_argument("--rank", type=int, default=128)
    args = arguments(parser, context_shape=MINIATURE, rank=8)
    tries = [
        ("llama-2-7b", Batch(1, 2048), 8 * GIB),
        ("llama-2-7b", Batch(4, 2048), 24 * GIB),
        ("llama-3.1-8b", Batch(4, 2048), 24 * GIB),
    ]
    args.first, args.unit, args.context_bytes = (8192, 16384), 1024, 24 * GIB
    if args.miniature:
        tries = [(MINIATURE, Batch(2, 32), GIB)]
        args.first, args.unit, args.context_bytes = (64, 128), 64, 16 * 2**20
    record = Record(args.output, "limits", QUESTION, {"rank": args.rank, "optimizer": OPTIMIZER}, args.resume)
    if args.only != "context":
        for shape, batch, size in tries:
            name = f"{shape}_{batch.size}x{batch.length}_{size / GIB:g}GiB"
            record.stage(name, partial(trains, args, shape, batch, size))
    if args.only != "trains":
        context(args, record)


if __name__ == "__main__":
    main()

"""Time and bandwidth of each fused kernel of `qosora.layers.ops` against the plain code, at shapes of 7B and 8B models.

Two times are measured. "device": from the first launch to the last result by CUDA events, with a cold second-level
cache, as in a model whose layers follow one another. "call": as a program sees one that waits for it, with what Python
and the launches cost. GB/s are the bytes that must be read and written at least, over the median of the device's time.

    python benchmarks/ops.py --output benchmarks/results/kernels_gpu.json

Without a GPU, `--miniature` runs the kernels on tiny tensors in Triton's interpreter: same results, no times.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

if "--miniature" in sys.argv:  # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from common import Record, in_turns, quantiles

from qosora.decompose import nf4
from qosora.errors import QosoraError
from qosora.layers import ops

QUESTION = "How long does each fused kernel take, against the plain code, and which bandwidth does it reach?"
#: (out_features, in_features) of Llama-2-7B's and Llama-3.1-8B's layers.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
RANKS = (64, 128, 256)
#: Bytes written between two calls: more than any GPU's second-level cache holds, for longer than launches take.
FLUSHED_BYTES = 2**30


class Operation(NamedTuple):
    """What is timed: `run(*inputs)`, of which it may overwrite the inputs."""

    run: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...]
    moved_bytes: int
    #: Largest relative difference, in the Frobenius norm, of the kernel's results from the plain code's.
    tolerance: float


def operations(m: int, n: int, rank: int, dtype: torch.dtype, device: str) -> dict[str, Operation]:
    """Return the operations of a layer."""
    torch.manual_seed(0)
    R, U = (nf4.quantize(torch.randn(rows, columns, device=device)) for rows, columns in ((m, n), (rank, m)))
    s, o = torch.rand(rank, device=device), torch.rand(m, device=device)
    P, bias = torch.randn(rank, m, device=device), torch.randn(m, device=device).to(dtype)
    vectors, size = s.nbytes + o.nbytes, dtype.itemsize

    def add_low_rank(y: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor]:
        ops.add_low_rank_(y, h, U, s, o, bias)
        return (y,)

    found = {
        "dequantize": Operation(lambda: (ops.dequantize(R, dtype),), (), R.nbytes + m * n * size, 0.0),
        "scaled_U": Operation(lambda: (ops.scaled_U(U, s, o, dtype),), (), U.nbytes + vectors + rank * m * size, 0.0),
        "vector_gradients": Operation(
            lambda P: ops.vector_gradients(P, U, s, o), (P,), P.nbytes + U.nbytes + 2 * vectors, 1e-5
        ),
    }
    for rows in (1, ops.FEW_ROWS):
        y, h = (torch.randn(rows, columns, device=device).to(dtype) for columns in (m, rank))
        moved = 2 * y.nbytes + h.nbytes + U.nbytes + vectors + bias.nbytes
        found[f"add_low_rank_{rows}"] = Operation(add_low_rank, (y, h), moved, 2 * torch.finfo(dtype).eps)
    return found


def measure(operation: Operation, rounds: int) -> dict[str, Any]:
    """Compare the results; where there is a GPU and rounds are wanted, the times."""

    def plain(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return operation.run(*inputs)

    def fused(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with ops.fused():
            return operation.run(*inputs)

    pairs = zip(*(run(*(t.clone() for t in operation.inputs)) for run in (fused, plain)), strict=True)
    difference = max(float(torch.dist(a.float(), b.float()) / torch.linalg.norm(b.float())) for a, b in pairs)
    if not difference <= operation.tolerance:
        raise QosoraError(
            f"must be within {operation.tolerance:.1e} of the plain code's result, is {difference:.1e} off"
        )
    found: dict[str, Any] = {"relative_difference": difference, "moved_bytes": operation.moved_bytes}
    if not rounds:
        return found
    actions = {"plain": partial(plain, *operation.inputs), "fused": partial(fused, *operation.inputs)}
    seconds = {name: device_seconds(action, rounds) for name, action in actions.items()}
    bandwidth = {name: round(operation.moved_bytes / times["median"] / 1e9, 1) for name, times in seconds.items()}
    speedup = round(seconds["plain"]["median"] / seconds["fused"]["median"], 3)
    call = in_turns(actions, rounds, against="plain", warmup=3)
    return {**found, "device_seconds": seconds, "gb_per_second": bandwidth, "device_speedup": speedup, "call": call}


def device_seconds(action: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time an action by CUDA events; it is launched while the cache is being emptied, so launches are not seen."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    action()
    for start, end in events:
        flushed.zero_()
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return quantiles([start.elapsed_time(end) / 1e3 for start, end in events])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--miniature", action="store_true", help="tiny tensors in Triton's interpreter, no times")
    parser.add_argument("--resume", action="store_true", help="keep the stages that the output holds")
    args = parser.parse_args()
    if not (args.miniature or torch.cuda.is_available()):
        parser.error("needs a GPU; --miniature needs none")
    shapes: tuple[tuple[int, int], ...] = SHAPES
    ranks: tuple[int, ...] = RANKS
    dtype = torch.bfloat16
    if args.miniature:  # in float16: the interpreter cuts down to bfloat16 instead of rounding
        shapes, ranks, dtype, args.rounds = ((96, 64),), (8,), torch.float16, 0
    device = "cpu" if args.miniature else "cuda"
    config = {"dtype": str(dtype).removeprefix("torch."), "rounds": args.rounds, "flushed_bytes": FLUSHED_BYTES}
    record = Record(args.output, "kernels", QUESTION, config, args.resume)
    try:
        for m, n in shapes:
            for rank in ranks:
                for name, operation in operations(m, n, rank, dtype, device).items():
                    if name != "dequantize" or rank == ranks[0]:  # of the residual, whatever the rank
                        record.stage(f"{name}_{m}x{n}_r{rank}", partial(measure, operation, args.rounds))
    except QosoraError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

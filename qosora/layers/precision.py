"""Which dtype a CPU computes quickly in: measured, since names of processors do not tell.

With the instructions for it, a 16-bit product takes half the time of one in float32. Without them it takes 5 to 60
times as long, so that a base in bfloat16 is read, and generates, faster in float32, at twice the bytes of what is not
decomposed.
"""

from __future__ import annotations

import functools
import time

import torch

from qosora.decompose import reproducible

__all__ = ["fast_dtype", "slowdown"]

#: Of the product that is timed, rows and width: a few milliseconds on the slowest processor that was tried.
_ROWS, _WIDTH = 32, 512
#: 16 bits are given up where they take this many times as long: less is not worth the memory.
_TOO_SLOW = 2.0


def fast_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype, or float32 in place of one of 16 bits in which this machine's CPU is slow."""
    return torch.float32 if dtype.itemsize == 2 and slowdown(dtype) > _TOO_SLOW else dtype


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """Return how many times as long a product takes in a dtype as in float32, on one thread of the CPU."""
    return _seconds(torch.ones(_ROWS, _WIDTH, dtype=dtype)) / _seconds(torch.ones(_ROWS, _WIDTH))


@reproducible
def _seconds(x: torch.Tensor) -> float:
    """Time a product, in time that this thread has had: other processes do not count."""
    weight = x.new_ones(_WIDTH, _WIDTH)

    def once() -> float:
        start = time.thread_time()
        torch.nn.functional.linear(x, weight)
        return time.thread_time() - start

    return min(once() for _ in range(5))

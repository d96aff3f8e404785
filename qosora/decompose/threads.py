"""Arithmetic on several threads with the same bits on any number of them.

torch cuts a matrix product or a sum into as many parts as it has threads, so its rounding depends on that number.
Here work is cut by its shape alone: `reproducible` runs a function on a thread whose torch operations use one thread
each, and `parallel_map` inside of it spreads pieces over as many such threads as torch may use
(`torch.get_num_threads()`, in the thread that called). torch releases the interpreter's lock while it computes.

Float32 products are computed in float32 meanwhile, not in TF32 or bfloat16, whatever the process has chosen.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

__all__ = ["panels", "parallel_map", "reproducible"]

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


class _Here(threading.local):
    """What a thread is part of: nothing, unless `reproducible` started it."""

    inside = False
    pool: ThreadPoolExecutor | None = None


_here = _Here()
_starting = threading.Lock()


def reproducible(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function of CPU tensors give the same bits on any number of threads. No gradients are recorded.

    On another device (that of the first argument) it runs where it is called.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if _here.inside:
            return function(*args, **kwargs)
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        with _full_float32():
            if device != "cpu":
                with torch.no_grad(), torch.autocast(device, enabled=False):
                    return function(*args, **kwargs)
            with _threads(torch.get_num_threads()) as pool:
                return pool.submit(function, *args, **kwargs).result()

    return run


def parallel_map(function: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
    """Return the results of independent calls, in order: on several threads inside of a `reproducible` function."""
    items = list(items)
    if _here.pool is None or len(items) == 1:
        return [function(item) for item in items]
    return list(_here.pool.map(function, items))


def panels(length: int, size: int, device: torch.device) -> list[slice]:
    """Cut range(length) into slices of `size`, the last one shorter; on another device than a CPU, into one."""
    size = size if device.type == "cpu" else max(length, 1)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """One thread to lead, which `parallel_map` sees the pool in, and `count` to follow, started when needed.

    A pool lives for one call: one that stayed would be lost in a forked process, and hang it.
    """
    workers = ThreadPoolExecutor(count, "qosora", _enter, (None,)) if count > 1 else None
    leader = ThreadPoolExecutor(1, "qosora", _enter, (workers,))
    try:
        yield leader
    finally:
        for pool in (workers, leader):
            if pool is not None:  # after Ctrl-C, the leader finds its pool closed and stops, too
                pool.shutdown(cancel_futures=True)


def _enter(pool: ThreadPoolExecutor | None) -> None:
    """Make the current, new thread one of one-thread operations."""
    _here.inside, _here.pool = True, pool
    torch.set_grad_enabled(False)
    with _starting:
        default = torch.get_num_threads()  # of this thread, which has just begun: the process's
        torch.set_num_threads(1)  # of this thread, and of all that begin later: those shall have what they had
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()


@contextmanager
def _full_float32() -> Iterator[None]:
    """Compute float32 matrix products in float32."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

"""The processes of a run: one for each GPU, begun by `accelerate launch` or `torchrun`, or this one alone.

All hold the whole base and do the same, each with its part of every batch; the first one (`main`) alone writes. What
each does by itself before training is done under `agreed`, so that an error of any ends all of them, told once.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from qosora.errors import EndedElsewhere, QosoraError, first_line

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """The processes that train together.

    Args:
        rank: Of this one.
        count: Of all.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @classmethod
    def here(cls) -> Processes:
        """Join the other processes of the launcher that began this one, if one did.

        Raises:
            QosoraError: They cannot be reached.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            state = PartialState(cpu=not torch.cuda.is_available())
        except (RuntimeError, ValueError) as error:
            raise QosoraError(f"the other processes of this run cannot be reached: {first_line(error)}") from error
        return cls(state.process_index, state.num_processes)

    @staticmethod
    def leave() -> None:
        """Part from the other processes, when all have come here: nothing more can be done together.

        A process that ends without it may be aborted by what still listens to the others.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gc.collect()  # of what holds the group, so that its threads end before the interpreter does
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Do something in every process; where it fails in one, end all.

        Raises:
            EndedElsewhere: It failed in another process, or in an earlier one, too, which says why.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = [rank for rank, said in enumerate(gather_object([error is not None])) if said]
        if failed and error is not None and self.rank == failed[0]:
            raise error
        if failed:
            raise EndedElsewhere(f"process {failed[0]} of {self.count} ended; see what it said") from error

    def from_main(self, make: Callable[[], T]) -> T:
        """Return what the first process makes, in all of them."""
        with self.agreed():
            made: list[Any] = [make() if self.main else None]
        if self.count > 1:
            broadcast_object_list(made)
        result: T = made[0]
        return result

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, in all of them."""
        values: list[T] = gather_object([value]) if self.count > 1 else [value]
        return values

"""Make a folder of tensors unit by unit: in bounded memory, resumable, by one process or by many.

A unit is read, made and written, each step at the same time as another step of its neighbours, so that three units
are in memory at once. Several processes, on machines that share the folder, divide the units by cost; `accelerate
launch` or torchrun starts them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qosora.checkpoints.shards import StoredSpec
from qosora.checkpoints.unfinished import UnfinishedFolder
from qosora.errors import CheckpointError

__all__ = ["Processes", "Progress", "Unit", "stream"]


@dataclass(frozen=True)
class Unit:
    """Some tensors that are made together.

    Attributes:
        name: Of the unit.
        specs: What it makes, by name.
        cost: Of making it, in any measure that is the same for all units.
        files: What it is made of; they must not change meanwhile, and a finished unit whose files did is made anew.
        read: Returns what `make` needs; called ahead of time, in another thread.
        make: Returns the tensors, and a report (plain data) that is kept with them.
    """

    name: str
    specs: Mapping[str, StoredSpec]
    cost: float
    files: Sequence[Path]
    read: Callable[[], Any]
    make: Callable[[Any], tuple[Mapping[str, torch.Tensor], dict[str, Any]]]

    def stamp(self) -> list[list[Any]]:
        """Return what tells whether the files were changed: their names, sizes and times of modification."""
        found = [(file.name, file.stat()) for file in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


@dataclass(frozen=True)
class Progress:
    """How far the work is.

    Attributes:
        reports: Of the finished units, by name.
        total: Number of units.
        done_bytes: Bytes of the finished units.
        total_bytes: Bytes of all.
        seconds_left: Estimated from the cost of what is left; None where nothing was made yet.
    """

    reports: Mapping[str, dict[str, Any]]
    total: int
    done_bytes: int
    total_bytes: int
    seconds_left: float | None

    @property
    def done(self) -> int:
        """Number of finished units."""
        return len(self.reports)


class Processes:
    """The processes that work together: those of one `accelerate launch` or torchrun, or this one alone.

    Use as a context manager. Not accelerate's `PartialState`, which sets up the whole program's default group for its
    devices: here processes but wait for each other, for days if need be.

    Attributes:
        index: Of this process.
        local_index: Of this process on its machine.
        count: Of all.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.index, self.local_index = (
            (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK")) if self.count > 1 else (0, 0)
        )
        self._group: Any = None
        self._started = False

    def __enter__(self) -> Processes:
        if self.count > 1:
            patience = timedelta(days=30)  # the first to have done its share waits for the last
            self._started = not dist.is_initialized()
            if self._started:
                dist.init_process_group("gloo", timeout=patience)
            self._group = dist.new_group(backend="gloo", timeout=patience)
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Return when all processes are here."""
        if self._group is not None:
            dist.barrier(self._group)

    def in_first(self, function: Callable[[], object]) -> None:
        """Call a function in the first process while the others wait; where it fails, they end with status 1."""
        outcome = [False]
        try:
            if self.index == 0:
                function()
                outcome = [True]
        finally:
            if self._group is not None:
                dist.broadcast_object_list(outcome, src=0, group=self._group)
        if not outcome[0]:
            raise SystemExit(1)  # the first process says why


def stream(
    output: str | Path,
    units: Sequence[Unit],
    finish: Callable[[Path, Mapping[str, dict[str, Any]]], Mapping[str, Any]],
    *,
    job: Mapping[str, Any],
    max_shard_bytes: int,
    stem: str | None = "model",
    check: Callable[[Path, Mapping[str, dict[str, Any]]], Mapping[str, Any]] | None = None,
    before: Callable[[Path], object] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    processes: Processes | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Make a folder of the tensors of some units, or go on where an earlier call has ended.

    Args:
        output: Folder to make.
        units: What it holds, in the order in which it fills the shards.
        finish: Writes the other files into a folder, given all units' reports, and returns what the manifest says.
        job: What determines the tensors besides the units' files: plain data. A later call must have the same.
        max_shard_bytes: Size of the shards.
        stem: What stands for "model" in their names; None where no shard is to be.
        check: Called like `finish` when the folder can be loaded and is not yet in its place; returns more for the
            manifest. If it raises a CheckpointError, nothing of the folder is left.
        before: Called ahead of the work with a file for what it needs besides, which a later call finds again; in the
            first process, then in the others.
        overwrite: Whether a model in `output` may be replaced; it stays until the new one is complete.
        restart: Whether to throw away what an earlier call has left unfinished.
        processes: Those that work together; each calls this with the same arguments.
        progress: Called in the first process at the start and after each of its units.

    Returns:
        The units' reports, by name.

    Raises:
        CheckpointError: If the output cannot be written, or a unit cannot be made.
        ConfigError: If an earlier call that did not end had another job.
    """
    processes = processes or Processes()
    stamps = {unit.name: unit.stamp() for unit in units}
    folder = UnfinishedFolder(output, {unit.name: unit.specs for unit in units}, job, max_shard_bytes, stem)

    def reports() -> dict[str, dict[str, Any]]:
        return {unit.name: folder.finished[unit.name] for unit in units}

    def complete() -> None:
        made = reports()
        folder.complete(lambda path: finish(path, made), None if check is None else lambda path: check(path, made))

    try:
        processes.in_first(lambda: folder.prepare(stamps, overwrite=overwrite, restart=restart))
        if before is not None:
            processes.in_first(lambda: before(folder.extra))
            if processes.index:
                before(folder.extra)
        folder.join(processes.index)
        _work(units, stamps, folder, processes, progress)
        processes.wait()
        folder.refresh()
        processes.in_first(complete)
    except (CheckpointError, OSError) as error:
        raise _explained(error, folder) from error
    finally:
        folder.leave()
    return reports()


def _work(
    units: Sequence[Unit],
    stamps: Mapping[str, Any],
    folder: UnfinishedFolder,
    processes: Processes,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Make this process's share of the units that are left."""
    left = [unit for unit in units if unit.name not in folder.finished]
    share = _share(left, processes.index, processes.count)
    left_cost, start = sum(unit.cost for unit in left), time.monotonic()
    sizes = {unit.name: sum(spec.nbytes for spec in unit.specs.values()) for unit in units}

    def write(unit: Unit, tensors: Mapping[str, torch.Tensor], report: dict[str, Any]) -> None:
        if unit.stamp() != stamps[unit.name]:
            raise CheckpointError(f"{unit.files[0]} was changed while it was read; run again when it is complete")
        folder.write(unit.name, tensors, stamps[unit.name], report)

    def tell() -> None:
        if progress and processes.index == 0:
            folder.refresh()
            done = [unit for unit in units if unit.name in folder.finished]
            made_cost = left_cost - sum(unit.cost for unit in left if unit.name not in folder.finished)
            rate = made_cost / (time.monotonic() - start)
            progress(
                Progress(
                    dict(folder.finished),
                    len(units),
                    sum(sizes[unit.name] for unit in done),
                    sum(sizes.values()),
                    (left_cost - made_cost) / rate if rate else None,
                )
            )

    tell()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = [reader.submit(unit.read) for unit in share[:1]]
        behind: list[Future[None]] = []
        for unit, following in zip_longest(share, share[1:]):
            source = ahead.pop().result()
            if following is not None:
                ahead.append(reader.submit(following.read))
            tensors, report = unit.make(source)
            del source
            if behind:
                behind.pop().result()
                tell()
            behind.append(writer.submit(write, unit, tensors, report))
            del tensors
        if behind:
            behind.pop().result()
            tell()


def _share(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """Return the units of one process: the costliest go first, each to the process that has least to do."""
    loads = [0.0] * count
    mine = set()
    for unit in sorted(units, key=lambda unit: -unit.cost):
        least = loads.index(min(loads))
        loads[least] += unit.cost
        if least == index:
            mine.add(unit.name)
    return [unit for unit in units if unit.name in mine]


def _explained(error: Exception, folder: UnfinishedFolder) -> CheckpointError:
    text = str(error)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        text = f"{error.filename or folder.target}: {error.strerror}{'; make room and run again' if full else ''}"
    folder.refresh()
    if folder.finished and folder.path.exists():
        text += (
            f" [{len(folder.finished)} of {len(folder.units)} units of the work are finished and kept in {folder.path}:"
            " the same command goes on from there]"
        )
    return CheckpointError(text)

"""A folder that is being made, beside the place where it will be: what is finished in it survives.

    OUT.partial/
        job.json           what is being made; a later process goes on only if it wants the same
        extra              what the work needs besides, if anything
        journal*.jsonl     a line for each finished unit of work: hashes of its tensors, and its report
        model/             shards of the final size, still without headers; becomes OUT when all units are finished

and, while a process is at work, OUT.partial.lock beside it.

A unit counts as finished if a journal says so and its tensors have the hashes that stand there, so a torn write, or one
that a loss of power has undone, is never taken for a finished one. OUT appears whole and at once. It is our own, as no
library that writes safetensors goes on with a half-written folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from qosora.checkpoints.folders import (
    check_target,
    expanded,
    locked,
    read_json,
    require_space,
    write_atomically,
    write_json,
)
from qosora.checkpoints.intact import hashed
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.checkpoints.shards import Shards, StoredSpec
from qosora.errors import CheckpointError, ConfigError
from qosora.formats import MANIFEST, UNFINISHED, require_known

__all__ = ["UnfinishedFolder"]

_OWN_NAMES = {
    "extra",
    ".extra.tmp",
    "job.json",
    ".job.json.tmp",
    "journal.jsonl",
    ".journal.jsonl.tmp",
    "model",
    "replaced",
}
#: What is finished is brought to the disk itself this often; a loss of power costs about as much work.
_SYNC_SECONDS = 10.0

logger = logging.getLogger(__name__)


class UnfinishedFolder:
    """A folder in the making.

    Args:
        target: The folder to make.
        units: Its units of work: name -> the tensors that each makes, in the order in which they fill the shards.
        job: What determines the tensors besides the files they are made of: plain data.
        max_shard_bytes: Size of the shards.
        stem: What stands for "model" in their names; None where no shard is to be.

    Attributes:
        path: Where it is until it is complete.
        extra: File for what the work needs besides.
        finished: Reports of the finished units, by name, as last read.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        units: Mapping[str, Mapping[str, StoredSpec]],
        job: Mapping[str, Any],
        max_shard_bytes: int,
        stem: str | None = "model",
    ) -> None:
        self.target = Path(os.path.realpath(expanded(target)))
        self.path = self.target.with_name(f"{self.target.name}.partial")
        self.units, self.job = units, dict(job)
        specs: dict[str, StoredSpec] = {}
        for made in units.values():
            if twice := specs.keys() & made.keys():
                raise CheckpointError(f"{min(twice)} would be written twice: two tensors of the source have that name")
            specs.update(made)
        layout = [[name, str(spec.dtype), spec.shape] for name, spec in specs.items()]
        self.job["tensors"] = hashlib.sha256(json.dumps([layout, max_shard_bytes, stem]).encode()).hexdigest()
        self.extra = self.path / "extra"
        self._data, self._replaced = self.path / "model", self.path / "replaced"
        self.shards = Shards(self._data, specs, max_shard_bytes, stem)
        self.finished: dict[str, dict[str, Any]] = {}
        self._seen: dict[Path, int] = {}  # bytes of each process's journal that `finished` has
        self._lock = ExitStack()
        self._begun = False
        self._new_parents: list[Path] = []
        self._journal = self.path / "journal.jsonl"
        self._synced = time.monotonic()

    # Before the work, in one process.

    def prepare(self, stamps: Mapping[str, Any], *, overwrite: bool, restart: bool) -> None:
        """Make the folder, or take over what an earlier process has left.

        Args:
            stamps: For each unit what tells whether the file that it is made of has changed.
            overwrite: Whether `target` may be replaced.
            restart: Whether to begin anew whatever is there.

        Raises:
            CheckpointError: If the folder cannot be made, or another process is at it.
            ConfigError: If it was begun with another job.
            OSError: If the disk is full.
        """
        self._new_parents = [parent for parent in self.path.parents if not parent.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(self.path))
        self._recover()
        check_target(self.target, overwrite)
        self._open(restart)
        self._take_over(stamps)
        require_space(self.target, self.shards.missing_bytes)
        self.shards.allocate()

    def _recover(self) -> None:
        """Undo or end what a process began that ended while it put the folder into its place."""
        if self._replaced.exists() and not self.target.exists():
            self._replaced.rename(self.target)
        if self._finished_elsewhere():
            shutil.rmtree(self.path)

    def _finished_elsewhere(self) -> bool:
        return (self.path / "job.json").exists() and not self._data.exists() and self.target.exists()

    def _open(self, restart: bool) -> None:
        file = self.path / "job.json"
        if self.path.exists():
            foreign = {entry.name for entry in self.path.iterdir()} - _OWN_NAMES
            if foreign := {name for name in foreign if not name.startswith("journal-")}:
                raise CheckpointError(f"{self.path} is needed for the work, but holds {min(foreign)!r}; move it away")
        self._begun = True
        self._data.mkdir(parents=True, exist_ok=True)
        if restart or not file.exists():
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self._data.mkdir()
            write_json(file, {"format_version": UNFINISHED, "job": self.job})
        begun = read_json(file)
        if "job" in begun:  # else it was begun before there were versions
            require_known(file, begun.get("format_version"), UNFINISHED)
            begun = begun["job"]
        if changes := [key for key in sorted(self.job | begun) if _plain(self.job.get(key)) != begun.get(key)]:
            raise ConfigError(
                f"{self.path} holds work that was begun differently: "
                + ", ".join(f"{k} was {begun.get(k)!r}, is {self.job.get(k)!r}" for k in changes)
                + ". Go on as it was begun, or begin anew with restart"
            )

    def _take_over(self, stamps: Mapping[str, Any]) -> None:
        """Keep the finished units that are whole and made of files that are still the same, and nothing else."""
        for path in self._data.iterdir():  # what was written when an earlier process was about to be done
            if path.name not in self.shards.files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        found = {name: entry for name, entry in _entries(self.path).items() if name in self.units}
        current = {name: e for name, e in found.items() if e["stamp"] == _plain(stamps[name])}
        with ThreadPoolExecutor() as pool:
            whole = pool.map(self._is_whole, current.values())
            kept = {name: entry for (name, entry), ok in zip(current.items(), whole, strict=True) if ok}
        for count, why in (
            (len(found) - len(current), "the file that they are made of has changed"),
            (len(current) - len(kept), "they are damaged"),
        ):
            if count:
                logger.warning("%s: %d finished tensors are made anew, as %s", self.path, count, why)
        write_atomically(self._journal, "".join(json.dumps(entry) + "\n" for entry in kept.values()))
        for journal in self.path.glob("journal-*.jsonl"):
            journal.unlink()
        self.finished = {name: entry["report"] for name, entry in kept.items()}

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        hashes = entry["sha256"]
        try:
            return hashes.keys() == self.units[entry["unit"]].keys() and all(
                self.shards.digest(name) == digest for name, digest in hashes.items()
            )
        except OSError:  # the shard is not there
            return False

    # The work, in any number of processes.

    def join(self, index: int) -> None:
        """Begin to work in process number `index`, after one process has prepared the folder."""
        self.finished = {name: entry["report"] for name, entry in _read_journal(self._journal)}
        self._journal = self.path / f"journal-{index}.jsonl"

    def write(self, unit: str, tensors: Mapping[str, torch.Tensor], stamp: Any, report: Mapping[str, Any]) -> None:
        """Write the tensors of a unit: it is finished.

        Raises:
            CheckpointError: If one has another shape, or does not fit into its dtype.
            OSError: If the disk is full.
        """
        hashes = {name: self.shards.write(name, tensors[name]) for name in self.units[unit]}
        line = json.dumps({"unit": unit, "stamp": stamp, "sha256": hashes, "report": report})
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.shards.sync()
                journal.flush()
                os.fsync(journal.fileno())
                self._synced = time.monotonic()

    def refresh(self) -> None:
        """See what all processes have finished since this was last asked."""
        for file in self.path.glob("journal-*.jsonl"):
            with file.open("rb") as journal:
                journal.seek(self._seen.get(file, 0))
                whole, newline, _ = journal.read().rpartition(b"\n")  # the last line may still be being written
            self._seen[file] = self._seen.get(file, 0) + len(whole) + len(newline)
            self.finished.update((name, entry["report"]) for name, entry in _parsed(whole.decode(errors="replace")))

    # After the work, in one process.

    def complete(
        self, finish: Callable[[Path], Mapping[str, Any]], check: Callable[[Path], Mapping[str, Any]] | None = None
    ) -> None:
        """Add the other files and move the folder into its place.

        Args:
            finish: Writes the other files into the folder that it is given, and returns the manifest's contents, to
                which the hashes of all files are added.
            check: Called with the folder when it can be loaded; returns more for the manifest. If it raises a
                CheckpointError, nothing of the folder is left.
        """
        manifest = {"format_version": MANIFEST, **finish(self._data)}
        self.shards.seal()
        if check is not None:
            try:
                manifest |= check(self._data)
            except CheckpointError:
                self.remove()
                raise
        files = sorted(p for p in self._data.rglob("*") if p.is_file() and p != self._data / MANIFEST_NAME)
        manifest["files"] = hashed(self._data, (path.relative_to(self._data).as_posix() for path in files))
        write_json(self._data / MANIFEST_NAME, manifest)
        _sync([*files, self._data / MANIFEST_NAME, self._data])
        if self.target.exists():
            self.target.rename(self._replaced)
        self._data.rename(self.target)
        _sync([self.target.parent])
        self.remove()

    def remove(self) -> None:
        """Remove what is left of the folder in the making, and let go of it."""
        self._recover()
        shutil.rmtree(self.path, ignore_errors=True)
        self._let_go()
        with suppress(OSError):
            for parent in self._new_parents:
                parent.rmdir()

    def leave(self) -> None:
        """Let go of the folder, and remove it if nothing is finished in it."""
        if self._begun and not _entries(self.path) and not self.extra.exists():
            self.remove()
        self._let_go()

    def _let_go(self) -> None:
        self._lock.close()
        self._begun = False


def _plain(value: Any) -> Any:
    """Return plain data as JSON gives it back."""
    return json.loads(json.dumps(value))


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: entry for file in sorted(folder.glob("journal*.jsonl")) for name, entry in _read_journal(file)}


def _read_journal(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Give the entries of a journal, whose last line may be torn."""
    with suppress(FileNotFoundError):
        yield from _parsed(file.read_text(encoding="utf-8", errors="replace"))


def _parsed(text: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for line in text.splitlines():
        with suppress(json.JSONDecodeError, KeyError, TypeError):
            entry = json.loads(line)
            yield entry["unit"], {key: entry[key] for key in ("unit", "stamp", "sha256", "report")}


def _sync(paths: Iterable[Path]) -> None:
    """Bring files and folders to the disk itself; what cannot be opened for that (folders on Windows) is left."""
    for path in paths:
        with suppress(PermissionError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

"""Whether the files of a folder are those that its manifest has the hashes of.

A flipped bit in a packed tensor is another model, and no other check would see it. So tensors are read once in full
when a folder is first used, and a file whose size, time and number (inode) have not changed since is not read again:
`~/.cache/qosora/verified.json` remembers them. `qosora verify` reads everything anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from qosora.checkpoints.folders import read_json, write_atomically
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.errors import CheckpointError

__all__ = ["file_digest", "hashed", "require_intact", "verify_files"]

#: Files that are remembered; the oldest are forgotten.
_REMEMBERED = 10_000


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hashed(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of files, by their names in the folder."""
    names = sorted(names)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_digest, (folder / name for name in names))
        return {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }


def require_intact(folder: Path) -> None:
    """Compare a folder's tensors with its manifest, if it has one.

    Raises:
        CheckpointError: If a file is missing or another.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return
    known, new, states = _remembered(), {}, {}
    for name, entry in _entries(folder).items():
        if name.endswith(".safetensors"):
            place, state = str((folder / name).resolve()), _state(folder / name, entry)
            if state is None or known.get(place) != state:
                new[name], states[place] = entry, state
    if bad := _problems(folder, new):
        raise CheckpointError(
            f"{folder}: {bad[0]}; get another copy, or make it anew. If it was changed on purpose, remove "
            f"{MANIFEST_NAME}"
        )
    if new:
        _remember(known | states)


def verify_files(folder: Path) -> list[str]:
    """Return a sentence for each file that is not what a folder's manifest says.

    Raises:
        CheckpointError: If the manifest cannot be used.
    """
    return _problems(folder, _entries(folder))


def _problems(folder: Path, entries: dict[str, dict[str, Any]]) -> list[str]:
    problems = []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            problems.append(f"{name} has {size:,} bytes, and the manifest says {entry['bytes']:,}")
        elif file_digest(path) != entry["sha256"]:
            problems.append(f"{name} has changed since the manifest was written (SHA-256)")
    return problems


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of each file."""
    files: Any = read_json(folder / MANIFEST_NAME).get("files")
    fine = isinstance(files, dict) and all(
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name, entry in files.items()
    )
    if not fine:
        raise CheckpointError(f"{folder / MANIFEST_NAME}: files must say bytes and sha256 of each; get another copy")
    return dict(files)


def _state(path: Path, entry: dict[str, Any]) -> list[Any] | None:
    with suppress(OSError):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns, found.st_ino, entry["sha256"]]
    return None


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qosora" / "verified.json"


def _remembered() -> dict[str, Any]:
    with suppress(OSError, CheckpointError, RuntimeError):  # no home, say
        return read_json(_memory())
    return {}


def _remember(states: dict[str, Any]) -> None:
    with suppress(OSError, RuntimeError):
        _memory().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_memory(), json.dumps(dict(list(states.items())[-_REMEMBERED:])))

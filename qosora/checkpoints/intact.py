"""Whether the files of a folder are those that its manifest has the hashes of.

A flipped bit in a packed tensor is another model, and no other check would see it. So tensors are read once in full
when a folder is first used, and a file whose size, time and number (inode) have not changed since is not read again:
`qosora.remembered` has them. `qosora verify` reads everything anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from qosora.checkpoints.folders import read_json
from qosora.checkpoints.names import ADAPTER_CONFIG, ADAPTER_STEM, MANIFEST_NAME
from qosora.errors import CheckpointError
from qosora.formats import MANIFEST, require_known
from qosora.remembered import recall, remember

__all__ = ["file_digest", "hashed", "manifest_key", "read_manifest", "recorded_files", "require_intact", "verify_files"]

_SUBJECT = "verified"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what a folder's manifest says; nothing where there is none.

    Raises:
        CheckpointError: If it cannot be used.
    """
    file = folder / MANIFEST_NAME
    if not file.is_file():
        return {}
    found = read_json(file)
    require_known(file, found.get("format_version"), MANIFEST)
    return found


def manifest_key(manifest: Mapping[str, Any]) -> str:
    """Return what tells a base from one that was made of other weights, by its manifest: its layers' errors."""
    return hashlib.sha256(json.dumps(manifest.get("layers"), sort_keys=True).encode()).hexdigest()


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
    """Compare a folder's tensors with the hashes that are there, if any are.

    Raises:
        CheckpointError: If a file is missing or another.
    """
    known, new, states = recall(_SUBJECT), {}, {}
    for name, entry in recorded_files(folder).items():
        if name.endswith(".safetensors"):
            place, state = str((folder / name).resolve()), _state(folder / name, entry)
            if state is None or known.get(place) != state:
                new[name], states[place] = entry, state
    if bad := _problems(folder, new):
        raise CheckpointError(
            f"{folder}: {bad[0]}; get another copy, or make it anew. If it was changed on purpose, take its hash out"
        )
    if new:
        remember(_SUBJECT, states)


def verify_files(folder: Path) -> list[str]:
    """Return a sentence for each file that is not what a folder's manifest says.

    Raises:
        CheckpointError: If the manifest cannot be used.
    """
    return _problems(folder, recorded_files(folder))


def _problems(folder: Path, entries: dict[str, dict[str, Any]]) -> list[str]:
    problems = []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != entry.get("bytes", size):
            problems.append(f"{name} has {size:,} bytes, and the manifest says {entry['bytes']:,}")
        elif file_digest(path) != entry["sha256"]:
            there = "the manifest" if "bytes" in entry else ADAPTER_CONFIG
            problems.append(f"{name} has changed since {there} was written (SHA-256)")
    return problems


def recorded_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a folder's manifest says of each file, or without one an adapter's config of its tensors.

    Raises:
        CheckpointError: If that cannot be used.
    """
    if not (folder / MANIFEST_NAME).is_file():
        weights, config = folder / f"{ADAPTER_STEM}.safetensors", folder / ADAPTER_CONFIG
        digest = read_json(config).get("weights_sha256") if weights.is_file() and config.is_file() else None
        return {weights.name: {"sha256": digest}} if isinstance(digest, str) else {}
    files: Any = read_manifest(folder).get("files")
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

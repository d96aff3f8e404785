"""What is remembered on this machine from command to command: JSON files in `~/.cache/qosora`.

Nothing depends on it but time and convenience: what cannot be read is not there, what cannot be written is forgotten.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["code_state", "file_state", "recall", "remember"]

#: Entries of a file, and files of a folder; the oldest are forgotten.
_KEPT, _KEPT_FILES = 10_000, 100


def recall(subject: str) -> dict[str, Any]:
    """Return what is remembered of a subject, by key. Subjects of a kind may be in a folder: "kind/subject"."""
    with suppress(OSError, ValueError, RuntimeError, RecursionError):  # no home, say, or a damaged file
        found = json.loads(_file(subject).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def remember(subject: str, entries: Mapping[str, Any]) -> None:
    """Add entries to what is remembered of a subject."""
    known = recall(subject)
    kept = {key: value for key, value in known.items() if key not in entries} | dict(entries)
    with suppress(OSError, RuntimeError):
        file = _file(subject)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(dict(list(kept.items())[-_KEPT:])), encoding="utf-8")
        temporary.replace(file)
        if "/" in subject:
            by_age = sorted(file.parent.glob("*.json"), key=lambda other: other.stat().st_mtime, reverse=True)
            for old in by_age[_KEPT_FILES:]:
                old.unlink(missing_ok=True)


def code_state(packages: Iterable[str]) -> list[Any]:
    """Return what is another when what computes is: versions of Python and of packages, and qosora's own code."""
    return [platform.python_version(), *map(version, packages), *_own_code()]


def file_state(path: Path) -> list[int]:
    """Return what is another when a file is, without reading it: its size, time and number (inode)."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


@cache
def _own_code() -> list[Any]:
    folder = Path(__file__).parent
    files = ((file, file.stat()) for file in sorted(folder.rglob("*.py")))
    return [[file.relative_to(folder).as_posix(), found.st_size, found.st_mtime_ns] for file, found in files]


def _file(subject: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qosora" / f"{subject}.json"

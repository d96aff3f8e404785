"""What a folder holds, remembered: it is read in full once, and as long as its files are the same that is told again.

To know whether a base holds all that its model needs, the model's class is imported, which takes seconds; to tell what
was found, nothing but the files' sizes and times is read, and neither torch nor transformers is loaded.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from qosora.remembered import code_state, file_state, recall, remember

__all__ = ["inspected"]

#: What a description is made of.
_READ = (".json", ".py", ".safetensors")
_COMPUTES = ("torch", "transformers", "peft")


def inspected(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a base or an adapter, as `describe` does.

    Args:
        folder: Of a base or an adapter.

    Returns:
        Plain data; `kind` is "base" or "adapter".

    Raises:
        CheckpointError: If it is neither, or damaged.
    """
    place = Path(folder).expanduser()
    subject = f"inspected/{hashlib.sha256(os.path.realpath(place).encode()).hexdigest()}"
    state, known = _state(place), recall(subject)
    if known.get("state") == state and isinstance(known.get("found"), dict):
        return known["found"] | {"folder": str(place)}
    from qosora.base.describe import describe

    found = describe(place)
    remember(subject, {"state": state, "found": found})
    return found


def _state(folder: Path) -> list[Any]:
    """Return what is another when a file of a folder is, or what reads it."""
    entries = os.scandir(folder) if folder.is_dir() else ()
    files = sorted([entry.name, *file_state(Path(entry.path))] for entry in entries if entry.name.endswith(_READ))
    return [code_state(_COMPUTES), files]

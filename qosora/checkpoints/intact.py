"""Whether the files of a folder are those that its manifest has the hashes of.

A flipped bit in a packed tensor is another model, and no other check would see it. A base that `save_pretrained` wrote
has no manifest, but hashes of its tensors in its files' headers, an adapter one of its tensors in its config. All is
read once in full when a folder is first used; of a file whose size, time and number (inode) are the same later on, that
is remembered (`qosora.remembered`). `qosora verify` reads everything anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qosora.checkpoints.folders import read_json
from qosora.checkpoints.names import ADAPTER_CONFIG, ADAPTER_STEM, MANIFEST_NAME
from qosora.errors import CheckpointError
from qosora.formats import MANIFEST, require_known
from qosora.remembered import file_state, recall, remember

__all__ = [
    "file_digest",
    "hashed",
    "manifest_key",
    "read_manifest",
    "recorded_files",
    "require_intact",
    "tensor_hashes",
    "verify_files",
]

_SUBJECT = "verified"
#: What the headers of files have the hashes under, and the digits of each.
_HEADER, _DIGITS = "qosora_tensors", 16


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


def tensor_hashes(tensors: Mapping[str, torch.Tensor], *, all_stay: bool) -> dict[str, str]:
    """Return what the header of a file that `save_pretrained` writes is to say of the tensors.

    Args:
        tensors: Of the model.
        all_stay: Whether all are written as they are; else only those of decomposed layers, and some in another form.
    """
    digests = sorted({_tensor_digest(tensor) for tensor in tensors.values()})
    return {_HEADER: json.dumps({"all": all_stay, "sha256": digests})}


def _tensor_digest(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def _in_header(path: Path) -> dict[str, Any] | None:
    """Return what a safetensors file's header says of its tensors, if it does."""
    with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_HEADER)
        if text is None:
            return None
        with suppress(ValueError, RecursionError):
            found = json.loads(text)
            if isinstance(found, dict) and isinstance(found.get("sha256"), list):
                return found
        raise CheckpointError(f"{path}: {_HEADER} in its header is damaged; get another copy")
    return None


def _changed_tensor(path: Path, said: dict[str, Any]) -> str | None:
    """Return the first tensor of a file that is none of those that its header has the hashes of."""
    digests = {digest for digest in said["sha256"] if isinstance(digest, str)}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                tensor = file.get_tensor(name)
                own = tensor.dtype == torch.uint8 or name.rpartition(".")[2] in ("s", "o", "c")
                if (own or said.get("all")) and _tensor_digest(tensor) not in digests:
                    return str(name)
    except SafetensorError:
        return "its header"
    return None


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
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _problem(folder / item[0], *item), entries.items())
        return [text for text in found if text is not None]


def _problem(path: Path, name: str, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != entry.get("bytes", size):
        return f"{name} has {size:,} bytes, and the manifest says {entry['bytes']:,}"
    if "header" in entry:
        changed = _changed_tensor(path, entry["header"])
        return None if changed is None else f"{name}: {changed} has changed since it was saved (SHA-256)"
    if file_digest(path) != entry["sha256"]:
        there = "the manifest" if "bytes" in entry else ADAPTER_CONFIG
        return f"{name} has changed since {there} was written (SHA-256)"
    return None


def recorded_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a folder's manifest says of each file; without one an adapter's config, or the headers of a base.

    Raises:
        CheckpointError: If that cannot be used.
    """
    if not (folder / MANIFEST_NAME).is_file():
        weights, config = folder / f"{ADAPTER_STEM}.safetensors", folder / ADAPTER_CONFIG
        digest = read_json(config).get("weights_sha256") if weights.is_file() and config.is_file() else None
        if weights.is_file():
            return {weights.name: {"sha256": digest}} if isinstance(digest, str) else {}
        headers = {path.name: _in_header(path) for path in sorted(folder.glob("*.safetensors"))}
        return {
            name: {"header": said, "sha256": hashlib.sha256(json.dumps(said).encode()).hexdigest()}
            for name, said in headers.items()
            if said is not None
        }
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
        return [*file_state(path), entry["sha256"]]
    return None

"""Checkpoints on disk: sharded safetensors read lazily, written atomically, and the identity of a base.

A folder is written under a temporary name beside its place and renamed when it is complete, so that nothing
half-written ever loads under the name that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qosora.errors import CheckpointError

__all__ = [
    "CheckpointReader",
    "ShardWriter",
    "atomic_folder",
    "base_fingerprint",
    "group_modules",
    "read_json",
    "write_json",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: Bytes of each packed tensor that enter the fingerprint.
_SAMPLE_BYTES = 4096
_PARTS = ("", "_absmax", "_absmax_scale", "_absmax_offset")
_SUFFIXES = (*(prefix + part for prefix in ("weight", "U", "V") for part in _PARTS), "s", "o")


class CheckpointReader:
    """Lazy access to the tensors of a folder of safetensors, sharded or not.

    Use as a context manager; nothing is read until a tensor is asked for.

    Args:
        folder: With `model.safetensors`, or shards and `model.safetensors.index.json`.

    Raises:
        CheckpointError: If the folder, a shard or a tensor is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._files = self._locate()

    def _locate(self) -> dict[str, str]:
        index, single = self.folder / INDEX_NAME, self.folder / SINGLE_NAME
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict):
                raise CheckpointError(f"{index}: no weight_map; the index is damaged")
            for file in sorted(set(files.values())):
                if not (self.folder / file).is_file():
                    raise CheckpointError(f"{index} names {file}, which is missing; get the whole checkpoint")
            return dict(files)
        if single.is_file():
            return dict.fromkeys(self._handle(SINGLE_NAME).keys(), SINGLE_NAME)
        raise CheckpointError(f"{self.folder}: no {SINGLE_NAME} and no {INDEX_NAME}, so this is no checkpoint folder")

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except SafetensorError as error:
                raise CheckpointError(
                    f"{self.folder / file}: not a whole safetensors file ({error}); get another copy"
                ) from error
        return self._open[file]

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Return the names of all tensors, in the files' order."""
        return list(self._files)

    def slice(self, name: str) -> Any:
        """Return a safetensors slice of a tensor: its shape and dtype, and its data on indexing."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        try:
            return self._handle(self._files[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / self._files[name]}: cannot read {name!r} ({error})") from error

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        try:
            tensor: torch.Tensor = self._handle(self._files[name]).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / self._files[name]}: cannot read {name!r} ({error})") from error
        return tensor


class ShardWriter:
    """Writes tensors into a folder in shards as they come, holding one shard at a time, with the index at the end.

    Args:
        folder: Exists, and is nobody else's.
        max_shard_bytes: A shard is written before it would grow over this; a larger tensor gets one of its own.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._shard_bytes = 0
        self._written: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; earlier ones may be written to disk."""
        if self._shard and self._shard_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._shard_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._shard, self.folder / f"shard-{len(self._written)}.tmp", metadata={"format": "pt"})
        self._written.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def close(self) -> None:
        """Write the last shard, give the shards their final names and write the index."""
        if self._shard or not self._written:
            self._flush()
        count = len(self._written)
        weight_map = {}
        for i, names in enumerate(self._written):
            file = SINGLE_NAME if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{i}.tmp").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            write_json(
                self.folder / INDEX_NAME, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            )


@contextmanager
def atomic_folder(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target` that becomes `target` if the block ends well, and is removed if not.

    Args:
        target: The folder to make; its parents are made.
        overwrite: Whether a folder that holds something may be replaced.

    Raises:
        CheckpointError: If `target` holds something and must not be replaced.
    """
    target = Path(target)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; name another folder, or ask to overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: If the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def group_modules(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the stored tensors of each decomposed layer, by the layer's name, from all tensor names of a base."""
    names = list(names)
    modules = [name.removesuffix(".U_absmax") for name in names if name.endswith(".U_absmax")]
    known = set(names)
    return {m: [f"{m}.{suffix}" for suffix in _SUFFIXES if f"{m}.{suffix}" in known] for m in modules}


def base_fingerprint(layers: Iterable[Mapping[str, Any]]) -> str:
    """Return the identity of a base: which weights it holds, decomposed how.

    It covers the vectors s and o, the shapes of all stored tensors and the first bytes of each, so it tells apart
    another model, rank, seed, method or block size, without reading the whole base. Names do not enter: a model's
    layers have other names inside PEFT than on disk.

    Args:
        layers: For each decomposed layer its stored tensors (or safetensors slices) by parameter name ("U", "s", ...).

    Returns:
        16 hexadecimal digits.
    """
    digests = sorted(_layer_digest(tensors) for tensors in layers)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _layer_digest(tensors: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for suffix in _SUFFIXES:
        if suffix not in tensors:
            continue
        source = tensors[suffix]
        shape = tuple(source.shape if isinstance(source, torch.Tensor) else source.get_shape())
        head = source[:_SAMPLE_BYTES] if shape and suffix not in ("s", "o") else source[...]
        digest.update(f"{suffix}{shape}{head.dtype}".encode())
        digest.update(head.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()

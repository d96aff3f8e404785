"""Sharded safetensors, read lazily and written as they come, and the identity of a base."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qosora.errors import CheckpointError
from qosora.folders import file_mode, read_json, write_json

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "CheckpointReader",
    "ShardWriter",
    "base_fingerprint",
    "group_modules",
    "stored_fingerprint",
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
        stem: What stands for "model" in these names: "adapter_model" for an adapter.

    Raises:
        CheckpointError: If the folder, a shard or a tensor is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], stem: str = "model") -> None:
        self.folder = Path(folder)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._files = self._locate(f"{stem}.safetensors")

    def _locate(self, single: str) -> dict[str, str]:
        index = self.folder / f"{single}.index.json"
        if index.is_file():
            return self._read_index(index)
        if (self.folder / single).is_file():
            return dict.fromkeys(self._handle(single).keys(), single)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder")
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in self.folder.glob(kind))
        hint = f" ({pickles[0]} is pickled, and only safetensors are read)" if pickles else ""
        raise CheckpointError(f"{self.folder}: no {single} and no {index.name}, so there are no weights here{hint}")

    def _read_index(self, index: Path) -> dict[str, str]:
        files = read_json(index).get("weight_map")
        # A name with a folder in it could point anywhere on the disk.
        if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
            raise CheckpointError(f"{index}: no weight_map from tensor names to file names; the index is damaged")
        for file in sorted(set(files.values())):
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{index} names {file}, which is missing; get the whole checkpoint")
        return dict(files)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
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

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self.slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        data = self.slice(name)
        dtype: torch.dtype = (data[:0] if data.get_shape() else data[...]).dtype
        return dtype

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
        self._names: set[str] = set()
        self._written: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; earlier ones may be written to disk.

        Raises:
            CheckpointError: If there was one of that name, or if there is no room on the disk.
        """
        if name in self._names:
            raise CheckpointError(f"{name} was to be written twice: two tensors of the source have that name")
        if self._shard and self._shard_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._names.add(name)
        self._shard[name] = tensor.contiguous()
        self._shard_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    @property
    def shard_count(self) -> int:
        """Shards written so far; all of them after `close`."""
        return len(self._written)

    def _flush(self) -> None:
        file = self.folder / f"shard-{len(self._written)}.tmp"
        try:
            save_file(self._shard, file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder.parent}: cannot write a shard of {self._shard_bytes / 2**30:.2f} GiB "
                f"({shutil.disk_usage(self.folder).free / 2**30:.2f} GiB are free there): {error}"
            ) from error
        file.chmod(file_mode())  # safetensors makes files that only their owner can read
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


def stored_fingerprint(reader: CheckpointReader) -> str:
    """Return the `base_fingerprint` of a base on disk."""
    groups = group_modules(reader.names()).values()
    return base_fingerprint({name.rpartition(".")[2]: reader.slice(name) for name in names} for names in groups)


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

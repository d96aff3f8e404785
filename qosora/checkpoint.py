"""Sharded safetensors, read lazily and written as they come, and the identity of a base."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qosora.errors import CheckpointError
from qosora.folders import read_json, write_json

__all__ = [
    "ADAPTER_STEM",
    "INDEX_NAME",
    "SINGLE_NAME",
    "CheckpointReader",
    "Shards",
    "TensorSpec",
    "base_fingerprint",
    "group_modules",
    "read_index",
    "stored_fingerprint",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: What stands for "model" in the name of an adapter's file.
ADAPTER_STEM = "adapter_model"
#: Bytes of each packed tensor that enter the fingerprint.
_SAMPLE_BYTES = 4096
#: Values that are cast and written at once.
_CHUNK_NUMEL = 1 << 23
#: Safetensors' names, in the order in which its own writer sorts tensors.
_DTYPE_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_ORDER = {dtype: i for i, dtype in enumerate(_DTYPE_CODES)}
_PARTS = ("", "_absmax", "_absmax_scale", "_absmax_offset")
_SUFFIXES = (*(prefix + part for prefix in ("weight", "U", "V") for part in _PARTS), "s", "o")


class CheckpointReader:
    """Lazy access to the tensors of a folder of safetensors, sharded or not.

    Use as a context manager; nothing is read until a tensor is asked for.

    Args:
        folder: With `model.safetensors`, or shards and `model.safetensors.index.json`.
        stem: What stands for "model" in these names: `ADAPTER_STEM` for an adapter.

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
            return read_index(index)
        if (self.folder / single).is_file():
            return dict.fromkeys(self._handle(single).keys(), single)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder")
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in self.folder.glob(kind))
        hint = f" ({pickles[0]} is pickled, and only safetensors are read)" if pickles else ""
        raise CheckpointError(f"{self.folder}: no {single} and no {index.name}, so there are no weights here{hint}")

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

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.folder / self._files[name]

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


def read_index(index: Path) -> dict[str, str]:
    """Return which file holds each tensor, from the index of a sharded checkpoint.

    Raises:
        CheckpointError: If the index is damaged, or a file of it is missing.
    """
    files = read_json(index).get("weight_map")
    # A name with a folder in it could point anywhere on the disk.
    if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
        raise CheckpointError(f"{index}: no weight_map from tensor names to file names; the index is damaged")
    for file in sorted(set(files.values())):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names {file}, which is missing; get the whole checkpoint")
    return dict(files)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor on disk is: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Return the spec of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shards:
    """A folder of safetensors whose tensors are known beforehand and written in any order, by any number of processes.

    The files have their final size from the start, so that a disk that is too small is noticed at once, and get their
    headers last: until `seal`, none of them is a safetensors file that anything would load.

    Args:
        folder: An existing folder.
        specs: The tensors by name, in the order in which they fill the shards.
        max_shard_bytes: A shard grows up to this size; a larger tensor has a shard of its own.
        stem: What stands for "model" in the files' names.

    Attributes:
        total_bytes: Of all tensors.
        count: Of files.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        max_shard_bytes: int,
        stem: str = "model",
    ) -> None:
        self.folder = Path(folder)
        self._single = f"{stem}.safetensors"
        self.specs = dict(specs)
        self.total_bytes = sum(spec.nbytes for spec in specs.values())
        groups = _fill(specs, max_shard_bytes)
        self.count = len(groups)
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._place: dict[str, tuple[str, int]] = {}  # name -> file, offset in it
        for i, names in enumerate(groups):
            file = self._single if self.count == 1 else f"{stem}-{i + 1:05d}-of-{self.count:05d}.safetensors"
            self._headers[file], offsets = _header({name: specs[name] for name in names})
            self._place.update({name: (file, offset) for name, offset in offsets.items()})
            self._sizes[file] = len(self._headers[file]) + sum(specs[name].nbytes for name in names)

    def allocate(self) -> None:
        """Make the files that are not there yet, at their full size.

        Raises:
            OSError: If the disk is too small.
        """
        for file, size in self._sizes.items():
            path = self.folder / file
            with path.open("r+b" if path.exists() else "x+b") as stream:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, size)
                stream.truncate(size)

    @property
    def missing_bytes(self) -> int:
        """Disk space that `allocate` would take."""
        blocks = {f: p.stat().st_blocks * 512 for f in self._sizes if (p := self.folder / f).exists()}
        return sum(max(0, size - blocks.get(file, 0)) for file, size in self._sizes.items())

    def write(self, name: str, tensor: torch.Tensor) -> str:
        """Write a tensor, cast to its dtype on disk, and return the SHA-256 of its bytes.

        Raises:
            CheckpointError: If it has another shape, or values that the dtype does not hold.
        """
        spec, (file, offset) = self.specs[name], self._place[name]
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name} was to have shape {spec.shape}, but has {tuple(tensor.shape)}")
        digest = hashlib.sha256()
        with (self.folder / file).open("r+b") as stream:
            stream.seek(offset)
            for part in torch.split(tensor.detach().reshape(-1), _CHUNK_NUMEL):
                data = _bytes(_cast(name, part.cpu(), spec.dtype))
                digest.update(data)
                stream.write(data)
        return digest.hexdigest()

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a tensor's bytes as they are on disk now."""
        file, offset = self._place[name]
        digest, left = hashlib.sha256(), self.specs[name].nbytes
        with (self.folder / file).open("rb") as stream:
            stream.seek(offset)
            while left and (data := stream.read(min(left, 1 << 24))):
                digest.update(data)
                left -= len(data)
        return digest.hexdigest()

    def sync(self) -> None:
        """Bring what was written to the disk itself, where it survives a loss of power."""
        for file in self._sizes:
            with (self.folder / file).open("r+b") as stream:
                os.fsync(stream.fileno())

    def seal(self) -> None:
        """Write the headers and the index: the folder can be loaded from now on."""
        for file, header in self._headers.items():
            with (self.folder / file).open("r+b") as stream:
                stream.write(header)
        self.sync()
        if self.count > 1:
            weight_map = {name: file for name, (file, _) in self._place.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / f"{self._single}.index.json", index)


def _fill(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Return the names of the tensors of each shard: at least one shard, and at least one tensor in each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a safetensors file and where in the file each tensor begins, as `save_file` has it."""
    for name, spec in specs.items():
        if spec.dtype not in _DTYPE_CODES:
            raise CheckpointError(f"{name} has dtype {spec.dtype}, which cannot be stored; cast it to another")
    ordered = sorted(specs, key=lambda name: (_DTYPE_ORDER[specs[name].dtype], name))  # wide ones first: all aligned
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in ordered:
        offsets[name], end = end, end + specs[name].nbytes
        code = _DTYPE_CODES[specs[name].dtype]
        entries[name] = {"dtype": code, "shape": list(specs[name].shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if cast.is_floating_point() and cast.numel() and not _finite(cast):
        if _finite(tensor):
            raise CheckpointError(
                f"{name}: its largest value, {float(tensor.abs().max()):.4g}, does not fit into {dtype}, which ends at "
                f"{torch.finfo(dtype).max:.4g}; use bfloat16 or float32"
            )
        raise CheckpointError(f"{name} holds NaN or infinity")
    return cast


def _finite(tensor: torch.Tensor) -> bool:
    return all(map(torch.isfinite, torch.aminmax(tensor)))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


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

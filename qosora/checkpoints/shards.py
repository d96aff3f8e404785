"""Sharded safetensors, written tensor by tensor as they come.

It is our own, as safetensors and huggingface_hub write a file's tensors all at once: none fills files of their final
size in any order, from several processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qosora.checkpoints.folders import write_json
from qosora.errors import CheckpointError

__all__ = ["Shards", "StoredSpec", "require_finite"]

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


@dataclass(frozen=True)
class StoredSpec:
    """What a tensor on disk is: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StoredSpec:
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
        stem: What stands for "model" in the files' names; None where there are to be no files.

    Attributes:
        total_bytes: Of all tensors.
        count: Of files.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        specs: Mapping[str, StoredSpec],
        max_shard_bytes: int,
        stem: str | None = "model",
    ) -> None:
        self.folder = Path(folder)
        self._single = f"{stem}.safetensors"
        self.specs = dict(specs)
        self.total_bytes = sum(spec.nbytes for spec in specs.values())
        groups = [] if stem is None else _fill(specs, max_shard_bytes)
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
    def files(self) -> set[str]:
        """Names of the shards."""
        return set(self._sizes)

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


def _fill(specs: Mapping[str, StoredSpec], max_shard_bytes: int) -> list[list[str]]:
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


def _header(specs: Mapping[str, StoredSpec]) -> tuple[bytes, dict[str, int]]:
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
    if not _is_finite(cast):
        require_finite(name, tensor)  # before it was cast
        raise CheckpointError(
            f"{name}: its largest value, {float(tensor.abs().max()):.4g}, does not fit into {dtype}, which ends at "
            f"{torch.finfo(dtype).max:.4g}; use bfloat16 or float32"
        )
    return cast


def require_finite(name: str, tensor: torch.Tensor, why: str = "") -> torch.Tensor:
    """Return a tensor of any dtype and shape, after checking that it holds neither NaN nor infinity.

    Args:
        name: What to call it in an error.
        tensor: To check.
        why: How it may have come to be otherwise, and what to do.

    Raises:
        CheckpointError: If it does.
    """
    if _is_finite(tensor):
        return tensor
    raise CheckpointError(f"{name} holds NaN or infinity{f': {why}' if why else ''}")


def _is_finite(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() and tensor.numel()) or all(map(torch.isfinite, torch.aminmax(tensor)))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data

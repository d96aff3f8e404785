"""Pickled weights: `pytorch_model.bin`, or shards and `pytorch_model.bin.index.json`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import TracebackType

import torch

from qosora.checkpoints.reader import read_index
from qosora.errors import CheckpointError

__all__ = ["PICKLED_INDEX_NAME", "PICKLED_NAME", "PickledReader"]

PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
_ZIP_MAGIC = b"PK\x03\x04"


class PickledReader:
    """Lazy access to the tensors of a folder of pickled weights, sharded or not.

    Files are unpickled by torch's `weights_only` loader, which makes tensors and runs nothing that a file names. One
    shard is open at a time, and mapped: what a tensor costs is pages of the file. Only files in the format of before
    torch 1.6 cannot be mapped; of those, one at a time is held in memory whole.

    Args:
        folder: With `pytorch_model.bin`, or shards and `pytorch_model.bin.index.json`.

    Raises:
        CheckpointError: If a shard or a tensor is missing or damaged, or a shard holds anything but tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = ""
        self._shard: dict[str, torch.Tensor] = {}
        self._shared: Counter[int] = Counter()
        self._specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        index = folder / PICKLED_INDEX_NAME
        single = (folder / PICKLED_NAME).is_file() or not index.is_file()
        self._files = dict.fromkeys(self._open(PICKLED_NAME), PICKLED_NAME) if single else read_index(index)

    def __enter__(self) -> PickledReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file, self._shard = "", {}

    def names(self) -> list[str]:
        """Return the names of all tensors, in the files' order."""
        return list(self._files)

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        return self.folder / self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._spec(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._spec(name)[1]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU: contiguous, and sharing memory with no other."""
        shard = self._open(self.file(name).name)
        if name not in shard:
            raise self._missing(name)
        tensor = shard[name].detach()
        if self._shared[tensor.untyped_storage().data_ptr()] > 1 or not tensor.is_contiguous():
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor

    def _spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if name not in self._specs:
            self._open(self.file(name).name)
        if name not in self._specs:
            raise self._missing(name)
        return self._specs[name]

    def _missing(self, name: str) -> CheckpointError:
        index = self.folder / PICKLED_INDEX_NAME
        return CheckpointError(f"{self.file(name)}: no tensor {name!r}, though {index.name} says so; get another copy")

    def _open(self, file: str) -> dict[str, torch.Tensor]:
        if file != self._file:
            self._file, self._shard = "", {}  # let go of one before the next
            self._shard = _load(self.folder / file)
            self._file = file
            self._shared = Counter(tensor.untyped_storage().data_ptr() for tensor in self._shard.values())
            self._specs |= {name: (tuple(t.shape), t.dtype) for name, t in self._shard.items()}
        return self._shard


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as stream:
            mappable = stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # the file decides how unpickling it fails
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} names {found[1]}, which is no part of a tensor, and to load it could run anything; get the "
                "model as safetensors"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a whole file of pickled tensors ({reason}); get another copy") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected tensors by name, got {type(state).__name__}; get the model's weights")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            raise CheckpointError(
                f"{path}: expected tensors by name, got {type(value).__name__} as {name!r}; this is no "
                "checkpoint of a model alone"
            )
    return dict(state)

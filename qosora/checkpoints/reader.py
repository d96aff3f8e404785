"""Sharded safetensors, read lazily."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qosora.checkpoints.folders import read_json
from qosora.errors import CheckpointError

__all__ = ["CheckpointReader", "read_index"]


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
        if (self.folder / single).is_file():  # transformers, too, takes it where both are there
            return dict.fromkeys(self._handle(single).keys(), single)
        if index.is_file():
            return read_index(index)
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

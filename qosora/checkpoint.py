"""Checkpoints on disk: sharded safetensors read lazily, written atomically, and the identity of a base.

A folder is written under a temporary name beside its place (`.NAME.XXXX.new`) and renamed when it is complete, so that
nothing half-written ever loads under the name that was asked for. A process that is killed leaves its temporary folder
behind; as it is locked for as long as its writer lives, the next one to write there can tell, and removes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qosora.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: abandoned folders stay
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "CheckpointReader",
    "ShardWriter",
    "atomic_folder",
    "base_fingerprint",
    "group_modules",
    "read_json",
    "require_space",
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
        file.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
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

    A folder that is replaced stays as it is until the new one is complete.

    Args:
        target: The folder to make; its parents are made.
        overwrite: Whether a model folder may be replaced, with all that it holds.

    Raises:
        CheckpointError: If `target` cannot be made or must not be replaced, or if the disk is full.
    """
    target = Path(os.path.realpath(target))
    parents = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        _check_target(target, overwrite)
        temporary, lock = _make_locked(target)
    except OSError as error:
        _remove_empty(parents)
        raise CheckpointError(f"{target}: cannot make a folder there ({error.strerror})") from error
    try:
        yield temporary
        _move_into_place(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(parents)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(f"{target}: cannot be written ({error.strerror}); make room and run again") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder")
    if os.path.ismount(target) or target == Path.cwd() or target in Path.cwd().parents:
        raise CheckpointError(f"{target} is a mount point or the current folder; name a new folder inside it")
    held = {entry.name for entry in target.iterdir()}
    if held and not overwrite:
        raise CheckpointError(f"{target} exists and is not empty; name another folder, or ask to overwrite it")
    if held and not held & {"config.json", "adapter_config.json"}:
        raise CheckpointError(
            f"{target} holds {min(held)!r} and no model (config.json), so it is not overwritten; name another folder"
        )


def _make_locked(target: Path) -> tuple[Path, int | None]:
    """Make the temporary folder; it has the name that `_remove_abandoned` looks for only once it is locked."""
    unlocked = Path(tempfile.mkdtemp(prefix=".qosora-", dir=target.parent))
    lock = _lock(unlocked)
    temporary = target.with_name(f".{target.name}{unlocked.name}.new")
    unlocked.rename(temporary)
    temporary.chmod(0o777 & ~_umask())
    return temporary, lock


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends; None if that cannot be done."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or the file system has no locks
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(target: Path) -> None:
    """Clean up after processes that were killed while they wrote `target`."""
    for folder in sorted(target.parent.iterdir()):
        name = folder.name.removeprefix(f".{target.name}.qosora-")
        if name == folder.name or not folder.is_dir():
            continue
        if name.endswith(".old"):
            if target.exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:  # killed between the two renames of `_move_into_place`
                folder.rename(target)
        elif name.endswith(".new") and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _move_into_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_suffix(".old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_empty(folders: Iterable[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_space(folder: str | os.PathLike[str], needed_bytes: int) -> None:
    """Check that there is room on the disk for what is to be written.

    Args:
        folder: Where to write; it need not exist yet.
        needed_bytes: How much.

    Raises:
        CheckpointError: If there is less free.
    """
    path = Path(os.path.realpath(folder))
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if needed_bytes > free:
        raise CheckpointError(
            f"{folder} needs {needed_bytes / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free there; make room, or "
            "name a folder on another disk"
        )


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

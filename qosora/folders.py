"""Folders: read from disk or the hub, written whole or not at all, and what is carried from one to the next.

A folder is written under a temporary name beside its place (`.NAME.XXXX.new`) and renamed when it is complete, so that
nothing half-written ever loads under the name that was asked for. A process that is killed leaves its temporary folder
behind; as it is locked for as long as its writer lives, the next one to write there can tell, and removes it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from qosora.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: abandoned folders stay
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_folder",
    "copy_files",
    "file_mode",
    "local_folder",
    "read_json",
    "refuse_input_as_output",
    "require_space",
    "write_json",
]

#: Files that tokenizers are made of, and others that a model needs.
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
_MODEL_FILES = ("generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
#: What those may be; never pickles, nor code.
_SAFE_SUFFIXES = ("", ".json", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".jinja", ".md", ".pdf")


def local_folder(source: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Return a local folder as it is, and download a hub id.

    Args:
        source: A folder, or a hub id.
        trust_remote_code: Whether to download code, too.

    Raises:
        CheckpointError: If it is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file; name the folder it lies in")
    if path.is_absolute() or str(source).startswith((".", "~")):
        raise CheckpointError(f"{source}: no such folder")
    patterns = ["*.safetensors", "*.json", *_TOKENIZER_FILES, *_MODEL_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns, ignore_patterns=["original/*"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{source}: neither a local folder nor something that the hub gives ({str(error).splitlines()[0]})"
        ) from error


def refuse_input_as_output(output: str | Path, *inputs: Path | None) -> None:
    """Check that writing a folder does not replace what it is made of.

    Raises:
        CheckpointError: If it would.
    """
    target = Path(output).resolve()
    for source in filter(None, inputs):
        if target in (source.resolve(), *source.resolve().parents):
            raise CheckpointError(f"{output} holds {source}, which is being read; name another folder")


def copy_files(folder: Path, base: Path, adapter: Path | None = None, *, with_code: bool) -> str | None:
    """Carry along what a model needs besides weights and config.

    Args:
        folder: Where to.
        base: The model, which has the generation config and the licence.
        adapter: Has the tokenizer, or else `base` has it.
        with_code: Whether to copy the model's `*.py`.

    Returns:
        The folder that the tokenizer is from, or None.
    """
    tokenizer = next((f for f in (adapter, base) if f is not None and _has_tokenizer(f)), None)
    wanted = [(base, pattern) for pattern in (*_MODEL_FILES, *(["*.py"] if with_code else []))]
    if tokenizer is not None:  # one folder's only: files of two tokenizers do not make one
        wanted += [(tokenizer, pattern) for pattern in _TOKENIZER_FILES]
    for source, pattern in wanted:
        for file in source.glob(pattern):
            if file.is_file() and file.suffix in (*_SAFE_SUFFIXES, *([".py"] if with_code else [])):
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    return None if tokenizer is None else str(tokenizer)


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken"))


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


def file_mode() -> int:
    """Return the mode that a new file has by the user's umask."""
    return 0o666 & ~_umask()


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

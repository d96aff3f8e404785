"""Folders: read from disk or the hub, checked before they are written, and what is carried from one to the next."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from qosora.checkpoints.names import ADAPTER_CONFIG, CONFIG_NAME, MANIFEST_NAME
from qosora.errors import CheckpointError, first_line

__all__ = [
    "check_target",
    "copy_files",
    "expanded",
    "has_tokenizer",
    "local_folder",
    "locked",
    "read_json",
    "refuse_input_as_output",
    "require_space",
    "tokenizer_folder",
    "write_atomically",
    "write_json",
]

#: Files that tokenizers are made of, and others that a model has.
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
#: Those that stand beside a tokenizer.json that says the same, for programs that read no other.
_BESIDE = ("*.model", "*.tiktoken", "*.spm")
_MODEL_FILES = ("generation_config.json", "*processor_config.json", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
#: What those may be; never pickles, nor code.
_SAFE_SUFFIXES = ("", ".json", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".jinja", ".md", ".pdf")


def expanded(source: str | os.PathLike[str]) -> str:
    """Return what a user's path or hub id means: "~" is the home folder."""
    return os.path.expanduser(str(source))


def local_folder(source: str | Path, *, trust_remote_code: bool = False, with_pickled: bool = False) -> Path:
    """Return a local folder as it is, and download a hub id.

    Args:
        source: A folder, or a hub id.
        trust_remote_code: Whether to download code, too.
        with_pickled: Whether to download pickled weights, if there are no safetensors.

    Raises:
        CheckpointError: If it is neither.
    """
    path = Path(source := expanded(source))
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file; name the folder it lies in")
    if path.is_absolute() or str(source).startswith((".", "~")):
        raise CheckpointError(f"{source}: no such folder")
    patterns = ["*.safetensors", "*.json", *_TOKENIZER_FILES, *_MODEL_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=patterns, ignore_patterns=["original/*"]))
        if with_pickled and not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return folder
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{source}: neither a local folder nor something that the hub gives ({str(error).splitlines()[0]})"
        ) from error


def refuse_input_as_output(output: str | Path, *inputs: Path | None) -> None:
    """Check that writing a folder does not replace what it is made of.

    Raises:
        CheckpointError: If it would.
    """
    target = Path(expanded(output)).resolve()
    for source in filter(None, inputs):
        if target in (source.resolve(), *source.resolve().parents):
            raise CheckpointError(f"{output} holds {source}, which is being read; name another folder")


def copy_files(folder: Path, base: Path, adapter: Path | None = None, *, with_code: bool) -> None:
    """Carry along what a model has besides weights and config.

    Args:
        folder: Where to.
        base: The model, which has the generation config, the model card and the licence.
        adapter: Has the tokenizer, or else `base` has it.
        with_code: Whether to copy the model's `*.py`.
    """
    # An adapter has the tokenizer as transformers writes it, and that leaves out files that other programs want.
    tokenizer = tokenizer_folder(adapter, base)
    added = [(base, pattern) for pattern in _BESIDE] if tokenizer == adapter else []
    wanted = [(base, pattern) for pattern in (*_MODEL_FILES, *(["*.py"] if with_code else []))]
    if tokenizer is not None:  # one folder's only: files of two tokenizers do not make one
        wanted += [*added, *((tokenizer, pattern) for pattern in _TOKENIZER_FILES)]
    for source, pattern in wanted:
        for file in source.glob(pattern):
            if file.is_file() and file.suffix in (*_SAFE_SUFFIXES, *([".py"] if with_code else [])):
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def tokenizer_folder(*folders: Path | None) -> Path | None:
    """Return the first of some folders that has a tokenizer, if one has."""
    return next((folder for folder in folders if folder is not None and has_tokenizer(folder)), None)


def has_tokenizer(folder: Path) -> bool:
    """Say whether there are files of a tokenizer; transformers makes an empty one of a model's config alone."""
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken"))


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a folder can be made, or be replaced.

    Args:
        target: The folder to make, resolved.
        overwrite: Whether a model folder may be replaced, with all that it holds.

    Raises:
        CheckpointError: If not.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder")
    if os.path.ismount(target) or target == Path.cwd() or target in Path.cwd().parents:
        raise CheckpointError(f"{target} is a mount point or the current folder; name a new folder inside it")
    held = {entry.name for entry in target.iterdir()}
    if held and not overwrite:
        raise CheckpointError(f"{target} exists and is not empty; name another folder, or ask to overwrite it")
    if held and not held & {CONFIG_NAME, ADAPTER_CONFIG, MANIFEST_NAME}:
        raise CheckpointError(
            f"{target} holds {min(held)!r} and no model ({CONFIG_NAME}), so it is not overwritten; name another folder"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes away from a folder, which need not exist, but its parent must.

    The lock is a file beside the folder, `FOLDER.lock`, as the folder itself comes and goes. A process that ends,
    however it does, unlocks it; only one that is killed leaves the file. Where files cannot be locked (some network
    file systems), nothing is.

    Raises:
        CheckpointError: If another process has locked it.
    """
    file = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{folder}: another process is at work there; wait for it, or end it") from error
    except OSError:
        pass
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes it on release
            file.unlink()  # still locked, so that nobody can hold a lock on a file that is gone
        lock.release()


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
            f"{folder} needs {_size(needed_bytes)}, but {_size(free)} are free there; make room, or name a folder on "
            "another disk"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: If the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # broken, not UTF-8, a number of thousands of digits, too deep
        raise CheckpointError(f"{path}: not valid JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON file, its keys sorted, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file under a temporary name and rename it: it is there whole, or as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise

"""Finds the files of a checkpoint and opens them, whatever their format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch

from qosora.checkpoints.folders import expanded, local_folder, read_json
from qosora.checkpoints.gguf_model import open_gguf
from qosora.checkpoints.names import ADAPTER_CONFIG, CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from qosora.checkpoints.pickled import PICKLED_INDEX_NAME, PICKLED_NAME, PickledReader
from qosora.checkpoints.reader import CheckpointReader
from qosora.checkpoints.stored_config import load_config, quantization_in
from qosora.errors import CheckpointError

__all__ = ["SourceCheckpoint", "TensorReader", "open_source"]

#: Configs of GPTQ and AWQ from before they were part of config.json.
_QUANTIZER_FILES = ("quantize_config.json", "quant_config.json")
#: Tensors of GPTQ and AWQ, FP8 and compressed-tensors, and bitsandbytes in 8 and 4 bits.
_QUANTIZED_SUFFIXES = (".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".SCB", ".absmax")


class TensorReader(Protocol):
    """The tensors of a checkpoint, by the names that they have on disk; for one thread at a time."""

    def names(self) -> list[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `tensor` gives it in."""

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU and contiguous."""


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint that is open for reading.

    Attributes:
        origin: Folder with its config.json, tokenizer and other small files; for a GGUF file a temporary one.
        reader: Its tensors.
        files: All files that hold them.
    """

    origin: Path
    reader: TensorReader
    files: tuple[Path, ...]


@contextmanager
def open_source(source: str | Path, *, trust_remote_code: bool = False) -> Iterator[SourceCheckpoint]:
    """Open an unquantized checkpoint, or a GGUF file, for reading tensor by tensor.

    Of a folder those files are read that transformers would load: safetensors, or else pickled weights
    (`pytorch_model.bin`), each in one file rather than in shards; or what config.json names. The tensors of a GGUF file
    are dequantized to float32; its config says bfloat16, for what remains as it is.

    Args:
        source: Folder or hub id of a causal language model, or a GGUF file.
        trust_remote_code: Whether to run model code that the checkpoint brings.

    Raises:
        CheckpointError: If there is no whole checkpoint, or one that is quantized already.
    """
    path = Path(source := expanded(source))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{source}: no such file")
        with TemporaryDirectory(prefix="qosora-") as temporary:
            origin = Path(temporary)
            yield SourceCheckpoint(origin, open_gguf(path, origin), (path,))
        return
    folder = local_folder(source, trust_remote_code=trust_remote_code, with_pickled=True)
    _refuse_quantized_config(folder, trust_remote_code)
    with _reader(folder) as reader:
        names = reader.names()
        _refuse_quantized_tensors(folder, names)
        yield SourceCheckpoint(folder, reader, tuple(sorted({reader.file(name) for name in names})))


def _reader(folder: Path) -> CheckpointReader | PickledReader:
    named = read_json(folder / CONFIG_NAME).get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or ".safetensors" not in named:
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: transformers_weights must name a safetensors file or index beside it, got "
                f"{named!r}"
            )
        return CheckpointReader(folder, named.partition(".safetensors")[0])
    if any((folder / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
        return CheckpointReader(folder)
    if any((folder / name).is_file() for name in (PICKLED_INDEX_NAME, PICKLED_NAME)):
        return PickledReader(folder)
    raise CheckpointError(f"{folder}: no weights there ({SINGLE_NAME}, {PICKLED_NAME}, or the index of either)")


def _refuse_quantized_config(folder: Path, trust_remote_code: bool) -> None:
    if not (folder / CONFIG_NAME).is_file() and (gguf := sorted(folder.glob("*.gguf"))):
        raise CheckpointError(f"{folder} holds GGUF files and no {CONFIG_NAME}; name the file, as {gguf[0]}")
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds {ADAPTER_CONFIG}, so transformers would load another model and the adapter onto it. Merge "
            f"the adapter and name the result; or remove {ADAPTER_CONFIG}, if it is a stale one"
        )
    if stored := quantization_in(load_config(folder, trust_remote_code=trust_remote_code)):
        raise _quantized(folder, str(stored.get("quant_method")))
    for name in _QUANTIZER_FILES:
        if (folder / name).is_file():
            raise _quantized(folder, f"as {name} says")


def _refuse_quantized_tensors(folder: Path, names: list[str]) -> None:
    if found := next((name for name in names if name.endswith(_QUANTIZED_SUFFIXES)), None):
        raise _quantized(folder, f"it holds {found}")


def _quantized(folder: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is quantized already ({how}): what quantization lost cannot be decomposed. Use the original 16-bit "
        "checkpoint"
    )

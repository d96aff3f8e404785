"""The GGUF container: metadata, a table of tensors, and their data, each row in blocks of some ggml type.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader` makes several Python objects of
each token in the vocabulary (20 s and 680 MB for 262,144 of them), so the table is read here, and the package is used
for the block sizes and values.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qosora.errors import CheckpointError

__all__ = ["GgufFile", "GgufTensor"]

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
#: Bytes of the other types of metadata: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINTS = {0: "<B", 2: "<H", 4: "<I", 10: "<Q"}
_TOKENS = "tokenizer.ggml.tokens"
_VOCABULARY = (_TOKENS, "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
#: Values that are dequantized at once: the package's functions take several times a float32 for each.
_CHUNK_NUMEL = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is.

    Attributes:
        shape: As in torch, the fastest dimension last.
        kind: Its ggml type.
        row_bytes: Of each row, along the last dimension.
        offset: In the file.
    """

    shape: tuple[int, ...]
    kind: int
    row_bytes: int
    offset: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return prod(self.shape[:-1])


class GgufFile:
    """A GGUF file, of which only the metadata is read until values are asked for.

    Attributes:
        architecture: As in the metadata.
        vocabulary: Number of tokens, 0 if the file has none.
        parts: Number of files that the model is split into.
        tensors: By name.

    Raises:
        CheckpointError: If it is no whole GGUF file, or holds tensors of a type that cannot be dequantized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.architecture, self.vocabulary, self.parts = "", 0, 1
        self.tensors: dict[str, GgufTensor] = {}
        self._entries: dict[str, slice] = {}  # where the metadata are
        try:
            with path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._parse()
        except (OSError, ValueError, struct.error, LookupError, OverflowError) as error:
            raise CheckpointError(f"{path}: not a whole GGUF file ({error}); get another copy") from error
        self._check()

    def _parse(self) -> None:
        if self._data[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._version, tensor_count, entry_count = struct.unpack_from("<IQQ", self._data, 4)
        if self._version not in (2, 3):
            raise ValueError(f"expected version 2 or 3, little-endian; got {self._version}")
        self._at, self._alignment = 24, 32
        for _ in range(entry_count):
            start, key, kind = self._at, self._string(), self._unpack("<I")
            value = self._at
            self._skip(kind)
            self._entries[key] = slice(start, self._at)
            if key == _TOKENS:
                _, self.vocabulary = struct.unpack_from("<IQ", self._data, value)
            elif key == "general.architecture":
                self.architecture = self._data[value + 8 : self._at].decode()
            elif key == "general.alignment":
                (self._alignment,) = struct.unpack_from(_UINTS[kind], self._data, value)
            elif key == "split.count":
                (self.parts,) = struct.unpack_from(_UINTS[kind], self._data, value)
        table = []
        for _ in range(tensor_count):
            name = self._string()
            shape = tuple(self._unpack("<Q") for _ in range(self._unpack("<I")))[::-1]
            table.append((name, shape, self._unpack("<I"), self._unpack("<Q")))
        if self._alignment < 1:
            raise ValueError("its alignment is 0")
        start = -(-self._at // self._alignment) * self._alignment
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        for name, shape, kind, offset in table:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if not shape or not prod(shape) or shape[-1] % block:
                raise ValueError(f"{name} has shape {shape}, which blocks of {block} values do not fill")
            self.tensors[name] = GgufTensor(shape, kind, shape[-1] // block * block_bytes, start + offset)

    def _unpack(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def _string(self) -> str:
        length = self._unpack("<Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _skip(self, kind: int) -> None:
        if kind in _WIDTHS:
            self._at += _WIDTHS[kind]
        elif kind == _STRING:
            length = self._unpack("<Q")  # moves on, too
            self._at += length
        elif kind == _ARRAY:
            element, count = self._unpack("<I"), self._unpack("<Q")
            if element in _WIDTHS:
                self._at += count * _WIDTHS[element]
            elif element == _STRING:
                for _ in range(count):
                    self._skip(_STRING)
            else:
                raise ValueError(f"metadata holds an array of type {element}")
        else:
            raise ValueError(f"metadata holds a value of type {kind}")

    def _check(self) -> None:
        kinds: set[int] = set()
        for name, tensor in self.tensors.items():
            end = tensor.offset + tensor.rows * tensor.row_bytes
            if end > len(self._data):
                raise CheckpointError(
                    f"{self.path}: {name} should end at byte {end}, but the file has {len(self._data)}; get another "
                    "copy"
                )
            if tensor.kind not in kinds:
                self._check_kind(name, tensor)
                kinds.add(tensor.kind)

    def _check_kind(self, name: str, tensor: GgufTensor) -> None:
        try:
            self._dequantize(np.zeros((1, tensor.row_bytes), np.uint8), tensor.kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: the gguf package cannot read {name} ({error}); get the model in another GGUF type"
            ) from error

    @staticmethod
    def _dequantize(rows: npt.NDArray[np.uint8], kind: int) -> npt.NDArray[np.float32]:
        from gguf import GGMLQuantizationType, dequantize

        values: npt.NDArray[np.float32] = dequantize(rows, GGMLQuantizationType(kind))
        return values

    def values(self, name: str, index: int | None = None) -> npt.NDArray[np.float32]:
        """Return the values of a tensor, or of one entry along its first dimension, as a new array."""
        tensor = self.tensors[name]
        shape, first, rows = tensor.shape, 0, tensor.rows
        if index is not None:
            shape = shape[1:]
            rows = prod(shape[:-1])
            first = index * rows
        start = tensor.offset + first * tensor.row_bytes
        data = np.frombuffer(self._data, np.uint8, rows * tensor.row_bytes, start).reshape(rows, -1)
        out = np.empty((rows, shape[-1]), np.float32)
        step = max(1, _CHUNK_NUMEL // shape[-1])
        for row in range(0, rows, step):
            out[row : row + step] = self._dequantize(data[row : row + step], tensor.kind)
        return out.reshape(shape)

    def write_outline(self, path: Path, *, vocabulary: bool) -> None:
        """Write a GGUF file with the same metadata and names of tensors, each of one value.

        Args:
            path: Of the new file.
            vocabulary: Whether to keep the vocabulary.
        """
        entries = [self._data[at] for key, at in self._entries.items() if vocabulary or key not in _VOCABULARY]
        names = [name.encode() for name in self.tensors]
        head = _MAGIC + struct.pack("<IQQ", self._version, len(names), len(entries))
        table = b"".join(struct.pack("<Q", len(raw)) + raw + struct.pack("<IQIQ", 1, 1, 0, 0) for raw in names)
        padding = bytes(self._alignment + 4)  # the value, wherever it is aligned to
        path.write_bytes(head + b"".join(entries) + table + padding)

"""The identity of a base: which weights it holds, decomposed how."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qosora.checkpoints.reader import CheckpointReader
from qosora.decompose import int8, parts
from qosora.errors import CheckpointError

__all__ = ["base_fingerprint", "eight_bit_scales", "group_modules", "stored_fingerprint"]

#: Bytes of each packed tensor that enter the fingerprint.
_SAMPLE_BYTES = 4096
_VECTORS = ("s", "o", "c")
_SUFFIXES = (*(name for part in parts.PARTS for name in parts.stored_names(part)), *_VECTORS)


def group_modules(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the stored tensors of each decomposed layer, by the layer's name, from all tensor names of a base."""
    known = dict.fromkeys(names)
    of = [f".{part}_absmax" for part in parts.PARTS.values()]  # any, so that a layer that lacks one is known as such
    modules = dict.fromkeys(n.removesuffix(end) for n in known for end in of if n.endswith(end))
    return {m: [f"{m}.{suffix}" for suffix in _SUFFIXES if f"{m}.{suffix}" in known] for m in modules}


def eight_bit_scales(reader: CheckpointReader) -> dict[str, str]:
    """Return the names of the scales of a base's matrices in 8 bits, by those of the matrices.

    Raises:
        CheckpointError: If a matrix has none, or one of another shape or dtype.
    """
    names = {*reader.names()}
    scales = {n.removesuffix(int8.SCALE) + "weight": n for n in names if n.rpartition(".")[2] == int8.SCALE}
    matrices = {n for n in names if reader.dtype(n) == torch.int8}
    for name in sorted(matrices | scales.keys()):
        if name not in matrices or name not in scales:
            lacking = f"{name}, which must be of int8" if name not in matrices else scales.get(name, f"{name}_scale")
            raise CheckpointError(f"{reader.folder}: {lacking}, is missing; get another copy")
        shape, dtype = reader.shape(scales[name]), reader.dtype(scales[name])
        if (shape, dtype) != (expected := reader.shape(name)[:1], torch.float32):
            raise CheckpointError(
                f"{reader.folder}: {scales[name]} must be {expected}, float32, got {shape}, {dtype}; get another copy"
            )
    return scales


def base_fingerprint(layers: Iterable[Mapping[str, Any]]) -> str:
    """Return the identity of a base: which weights it holds, decomposed how.

    It covers the vectors s, o and c, the shapes of all stored tensors and the first bytes of each, so it tells apart
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
        head = source[:_SAMPLE_BYTES] if shape and suffix not in _VECTORS else source[...]
        digest.update(f"{suffix}{shape}{head.dtype}".encode())
        digest.update(head.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()

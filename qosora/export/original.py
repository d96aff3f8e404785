"""The model that a base was made of: found, opened lazily, and checked to be that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qosora.checkpoints import SourceCheckpoint, manifest_key, open_source, read_manifest
from qosora.decompose import Factors, reconstruct
from qosora.errors import CheckpointError, ConfigError
from qosora.export.stored import AdaptedBase, Layer, Stored
from qosora.places import place_of

__all__ = ["Original", "open_original", "original_of"]

#: How much larger the base's error may be than it was when the base was made: room for the same model in another
#: 16-bit or 8-bit format, none for a fine-tuned one.
_SAME_ERROR = 1.02
#: Where it is not known: 4-bit formats err by 0.08 to 0.15, another model's weights by 1.4.
_LARGEST_ERROR = 0.25


def original_of(base: Path) -> str | None:
    """Return what `qosora quantize` made a base of, as its manifest says, or None where that does not say."""
    manifest = read_manifest(base)
    source = manifest.get("source")
    return place_of(source, base, manifest_key(manifest)) if isinstance(source, str) else None


class Original:
    """The tensors of the model that a base was made of.

    Args:
        name: As the user calls it.
        checkpoint: Open for reading.
        adapted: The base.

    Raises:
        CheckpointError: If a tensor of the base's is missing in it, or has another shape, or a base's layer is not
            nearly the model's.
    """

    def __init__(self, name: str, checkpoint: SourceCheckpoint, adapted: AdaptedBase) -> None:
        self.name = name
        self._reader = adapted.plain.apart(checkpoint.reader)
        self._adapted = adapted
        self._disk: dict[str, str] = {}  # names in the model -> names on its disk
        for disk in self._reader.names():
            self._disk.setdefault(adapted.plain.locate(disk)[0], disk)
        layers = read_manifest(adapted.base).get("layers", [])
        self._errors: dict[str, float] = {layer["name"]: layer["error"] for layer in layers}
        for stored in adapted.tensors.values():
            if not stored.trained:
                self._check_shape(stored.name, stored.shape)
        for layer in adapted.layers.values():
            shape = (layer.out_features, layer.in_features)
            self._check_shape(f"{layer.module}.weight", shape[::-1] if layer.transposed else shape)
        for layer in list(adapted.layers.values())[:: max(1, len(adapted.layers) - 1)]:  # before anything is written
            self.quantization_error(layer, self.weight(layer), adapted.factors(layer))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._reader.shape(self._name(name))
        if found != shape:
            raise CheckpointError(
                f"{self.name}: {self._name(name)} has shape {found}, but {self._adapted.base} was made of one with "
                f"{shape}; give the original of this base"
            )

    def _name(self, name: str) -> str:
        """Return the name on disk of a tensor, or of one that it is tied to."""
        found = next((self._disk[n] for n in (name, *self._adapted.plain.tied_to(name)) if n in self._disk), None)
        if found is None and "task" in read_manifest(self._adapted.base).get("made_with", {}):
            raise CheckpointError(
                f"{self.name}: no {name} there: {self._adapted.base} was given it at random, for its task. Export "
                "merged weights"
            )
        if found is None:
            raise CheckpointError(
                f"{self.name}: no {name} there, which {self._adapted.base} has; give the original of this base"
            )
        return found

    def tensor(self, stored: Stored) -> torch.Tensor:
        """Return a tensor that is not decomposed, as the original has it."""
        return self.named(stored.name)

    def named(self, name: str) -> torch.Tensor:
        """Return a tensor of the model's."""
        return self._reader.tensor(self._name(name))

    def weight(self, layer: Layer) -> torch.Tensor:
        """Return a layer's weight, (out_features, in_features), in the original's dtype."""
        weight = self.named(f"{layer.module}.weight")
        return weight.T if layer.transposed else weight

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor, by its name in the model."""
        return self._reader.file(self._name(name))

    def quantization_error(self, layer: Layer, weight: torch.Tensor, factors: Factors) -> float:
        """Return the relative Frobenius error of the base's layer.

        Args:
            layer: Of the base.
            weight: Its weight as `weight` gives it.
            factors: Its decomposition.

        Raises:
            CheckpointError: If it is too large: the base was made of another model.
        """
        norm = torch.linalg.vector_norm(weight, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        error = float(torch.linalg.vector_norm(reconstruct(factors).sub_(weight)) / norm)
        known = self._errors.get(layer.module)
        if not error <= (_LARGEST_ERROR if known is None else known * _SAME_ERROR + 1e-4):
            was = f"less than {_LARGEST_ERROR}" if known is None else f"{known:.4f}"
            raise CheckpointError(
                f"{self.name}: {layer.disk}.weight is {error:.4f} of its norm away from {self._adapted.base}'s, where "
                f"quantization alone makes {was}; another model has these shapes. Give the original of this base"
            )
        return error


@contextmanager
def open_original(original: str | Path | None, adapted: AdaptedBase, *, trust_remote_code: bool) -> Iterator[Original]:
    """Open the model that a base was made of.

    Args:
        original: Folder, hub id or GGUF file; by default what the base's manifest names, if it is still there.
        adapted: The base.
        trust_remote_code: Whether to run model code that it brings.

    Raises:
        CheckpointError: If it is not the original of the base, or was changed after that.
        ConfigError: If it is not given and not known.
    """
    adapted.require_pristine()
    if original is None:
        original = original_of(adapted.base)
        if original is None or not Path(original).exists():
            known = f"it was made of {original}, which is not there" if original else "it has no manifest that tells"
            raise ConfigError(
                f"{adapted.base}: the original model is needed, and {known}; name its folder, hub id or GGUF file with "
                "--original"
            )
    with open_source(original, trust_remote_code=trust_remote_code) as checkpoint:
        yield Original(str(original), checkpoint, adapted)

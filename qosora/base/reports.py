"""What a conversion says of the layers that it decomposed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ConversionReport", "LayerReport", "by_kind"]


@dataclass(frozen=True)
class LayerReport:
    """One decomposed layer: its size, relative errors and cost.

    Attributes:
        name: Of the module in the model.
        shape: (out_features, in_features).
        rank: Of its factors.
        error: Relative Frobenius error of the decomposition.
        nf4_error: The same for the weight quantized as it is.
        bits_per_parameter: Stored bits per entry of the weight.
        nf4_bits_per_parameter: The same for the weight quantized as it is.
        seconds: Time for decomposing, quantizing and measuring.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    error: float
    nf4_error: float
    bits_per_parameter: float
    nf4_bits_per_parameter: float
    seconds: float


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: What was converted.
        layers: The decomposed layers.
        base_bytes: Bytes of all tensors written.
        seconds: Wall time of the whole conversion.
    """

    source: str
    layers: list[LayerReport]
    base_bytes: int
    seconds: float

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Return means and sums by kind of layer, as the function of that name does."""
        return by_kind(map(asdict, self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "by_kind": self.by_kind()}


def by_kind(layers: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return layers, mean errors, mean bits per parameter and seconds by kind of layer (the last part of its name).

    Args:
        layers: `LayerReport`s as plain data; those that a base keeps have no seconds.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    means = ("error", "nf4_error", "bits_per_parameter", "nf4_bits_per_parameter")
    return {
        kind: {"layers": len(group)}
        | {key: sum(layer[key] for layer in group) / len(group) for key in means}
        | ({"seconds": sum(layer["seconds"] for layer in group)} if "seconds" in group[0] else {})
        for kind, group in kinds.items()
    }

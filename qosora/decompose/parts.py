"""The tensors that a decomposition is stored as, in a layer and on disk: their names, shapes, and the way back.

    weight, weight_absmax, weight_absmax_scale, weight_absmax_offset     R (out_features, in_features)
    U, U_absmax, U_absmax_scale, U_absmax_offset                         Uᵀ (rank, out_features)
    V, V_absmax, V_absmax_scale, V_absmax_offset                         Vᵀ (rank, in_features)

each as `nf4.FourBitTensor` has it. The residual is called `weight`, so that a loader that knows nothing of qosora stops
at its shape instead of initialising a weight at random. Beside them a layer has its vectors: `s`, `o`, and with a scale
`c`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qosora.decompose import nf4
from qosora.decompose.factorize import Factors
from qosora.decompose.nf4 import FourBitTensor

__all__ = ["PARTS", "factors", "four_bit", "shapes", "stored_names", "stored_shapes", "tensors"]

#: Attributes of `Factors`, and what the tensors of each are called after.
PARTS = {"residual": "weight", "U": "U", "V": "V"}


def stored_names(part: str, double_quant: bool = True) -> list[str]:
    """Return the names of the tensors that a part is stored as, in the order of `nf4.FIELDS`."""
    fields = nf4.FIELDS if double_quant else nf4.FIELDS[:2]
    return [PARTS[part] if field == "packed" else f"{PARTS[part]}_{field}" for field in fields]


def shapes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, int]]:
    """Return the shape of each part."""
    return {"residual": (out_features, in_features), "U": (rank, out_features), "V": (rank, in_features)}


def stored_shapes(
    out_features: int, in_features: int, rank: int, blocksize: int, double_quant: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each stored tensor, by name."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for part, (rows, columns) in shapes(out_features, in_features, rank).items():
        fields = nf4.stored_shapes(rows * columns, blocksize, double_quant)
        found |= dict(zip(stored_names(part, double_quant), fields.values(), strict=True))
    return found


def tensors(factors: Factors) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a decomposition, by name."""
    found: dict[str, torch.Tensor] = {}
    for part in PARTS:
        fields = getattr(factors, part).tensors()
        found.update(zip(stored_names(part, len(fields) > 2), fields.values(), strict=True))
    return found


def four_bit(
    part: str, stored: Mapping[str, Any], shape: tuple[int, int], quant_type: str, blocksize: int
) -> FourBitTensor:
    """Return a part from its stored tensors.

    Args:
        part: One of `PARTS`.
        stored: The tensors by name; others may be among them.
        shape: Of the part.
        quant_type: "nf4" or "fp4".
        blocksize: Values per block.
    """
    packed, absmax, scale, offset = map(stored.get, stored_names(part))
    return FourBitTensor(packed, absmax, scale, offset, shape, quant_type, blocksize)  # type: ignore[arg-type]


def factors(
    stored: Mapping[str, Any],
    part_shapes: Mapping[str, tuple[int, int]],
    sigma: torch.Tensor,
    quant_type: str,
    blocksize: int,
) -> Factors:
    """Return the decomposition that `tensors` takes apart.

    Args:
        stored: As `four_bit` takes them; with a scale, `c` (in_features,) float32 among them.
        part_shapes: As `shapes` gives them.
        sigma: (rank,), float32.
        quant_type: "nf4" or "fp4".
        blocksize: Values per block.
    """
    made = {part: four_bit(part, stored, shape, quant_type, blocksize) for part, shape in part_shapes.items()}
    return Factors(**made, sigma=sigma, scale=stored.get("c"))

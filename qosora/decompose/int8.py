"""A matrix in 8 bits: whole numbers, times a float32 scale for each row, as LLM.int8() has them (arXiv 2208.07339).

weight        (rows, columns) int8, from -127 to 127
weight_scale  (rows,) float32, the largest magnitude of a row over 127
"""

from __future__ import annotations

import torch

from qosora.errors import CheckpointError

__all__ = ["SCALE", "dequantize", "quantize"]

#: What the scales are stored as, beside "weight".
SCALE = "weight_scale"
_LARGEST = 127
#: Entries that are quantized at a time, for the memory of their float32 values.
_PIECE = 1 << 24


def quantize(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in 8 bits, and its scales.

    Args:
        weight: (rows, columns), of any floating dtype.
        name: For the message.

    Raises:
        CheckpointError: If it is not finite.
    """
    codes, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        piece, part = weight[start : start + rows].float(), slice(start, start + rows)
        largest = piece.abs().amax(1)
        if not largest.isfinite().all():
            bad = int((~torch.isfinite(weight)).sum())
            raise CheckpointError(
                f"{name}: {bad} of {weight.numel()} values are NaN or infinite; the checkpoint is damaged, or was "
                "saved from a diverged run; get another copy of it"
            )
        scales[part] = largest / _LARGEST
        # A row of zeros has a scale of 0; so has one of values so small that the scale is none.
        codes[part] = (piece / scales[part, None].clamp(min=torch.finfo(torch.float32).tiny)).round_()
    return codes, scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix, computed in float32 and rounded once. Differs from what was quantized by half a scale at most.

    Args:
        codes: (rows, columns), int8.
        scales: (rows,), float32.
        dtype: float32, float16 or bfloat16.
    """
    return torch.mul(codes, scales[:, None], out=torch.empty_like(codes, dtype=dtype))

"""A tensor stored in 4 bits per value: quantize, dequantize, multiply. The only door to bitsandbytes' quantization.

A float tensor is read in row-major order and cut into blocks of `blocksize` values. Each value x of a block becomes
the index of the nearest entry of a 16-entry table (NF4: quantiles of a normal distribution, QLoRA, arXiv 2305.14314;
FP4: a 4-bit float) to x / absmax, two indices to a byte. With double quantization the float32 absmax values, less
their mean, are quantized again to 8 bits in blocks of 256:

    x ≈ table[index] · (code[absmax] · absmax_scale + absmax_offset)

That makes 4 + 32 / blocksize bits per value, or 4 + 8 / blocksize + 32 / (256 · blocksize) with double quantization
(4.127 at blocksize 64).

The layout is bitsandbytes' own, held in plain tensors rather than in its `Params4bit`: those move, save, load and
trace like any other tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map

__all__ = ["BLOCKSIZES", "QUANT_TYPES", "FourBitTensor", "dequantize", "matmul", "quantize", "stored_shapes"]

QUANT_TYPES = ("nf4", "fp4")
#: bitsandbytes also knows 2048 and 4096, where its CPU kernels lose accuracy and fall back to compiled code.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024)
#: Block of the second quantization; fixed in bitsandbytes' kernels.
ABSMAX_BLOCKSIZE = 256


@dataclass(frozen=True)
class FourBitTensor:
    """A float tensor in 4 bits per value.

    Attributes:
        packed: (ceil(numel / 2),) uint8, two indices to a byte, the first in the high bits.
        absmax: (blocks,) uint8 with double quantization, float32 without; blocks = ceil(numel / blocksize).
        absmax_scale: (ceil(blocks / 256),) float32, or None without double quantization.
        absmax_offset: () float32, or None without double quantization.
        shape: Shape of the tensor.
        quant_type: "nf4" or "fp4".
        blocksize: Values per block.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax_scale: torch.Tensor | None
    absmax_offset: torch.Tensor | None
    shape: tuple[int, ...]
    quant_type: str
    blocksize: int

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors by field name."""
        fields = ("packed", "absmax", "absmax_scale", "absmax_offset")
        return {name: t for name in fields if (t := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> FourBitTensor:
        """Return the same tensor on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)


def stored_shapes(numel: int, blocksize: int, double_quant: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each stored tensor of a `FourBitTensor` of `numel` values, by field name."""
    blocks = -(-numel // blocksize)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"packed": ((-(-numel // 2),), torch.uint8)}
    if not double_quant:
        return shapes | {"absmax": ((blocks,), torch.float32)}
    return shapes | {
        "absmax": ((blocks,), torch.uint8),
        "absmax_scale": ((-(-blocks // ABSMAX_BLOCKSIZE),), torch.float32),
        "absmax_offset": ((), torch.float32),
    }


def quantize(
    tensor: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> FourBitTensor:
    """Quantize a tensor to 4 bits per value.

    Args:
        tensor: Any shape; float32, float16 or bfloat16. Must be finite.
        quant_type: "nf4" or "fp4".
        blocksize: Values per block, one of `BLOCKSIZES`.
        double_quant: Whether to quantize the blocks' absmax values again, to 8 bits.
    """
    ops = torch.ops.bitsandbytes
    packed, absmax = ops.quantize_4bit.default(tensor.contiguous(), blocksize, quant_type, torch.uint8)
    scale = offset = None
    if double_quant:
        offset = absmax.mean()
        code = _absmax_code(tensor.device)
        absmax, scale = ops.quantize_blockwise.default(absmax - offset, code, ABSMAX_BLOCKSIZE)
    return FourBitTensor(packed.reshape(-1), absmax, scale, offset, tuple(tensor.shape), quant_type, blocksize)


def dequantize(q: FourBitTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the tensor of shape `q.shape` in `dtype` (float32, float16 or bfloat16)."""
    shape, numel = q.shape, math.prod(q.shape)
    # bitsandbytes' CPU kernel takes wrong absmax values where a row ends inside a block (0.50.2; (3, 16) at blocksize
    # 32), and for odd rows compiles a fallback, for seconds. As one even row the values are right, on one thread.
    if shape[-1] % q.blocksize:
        shape = (numel + numel % 2,)
    out: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        q.packed, _absmax(q), q.blocksize, q.quant_type, shape, dtype
    )
    return out.view(-1)[:numel].view(q.shape)  # the kernel returns a vector as a matrix of one row


def matmul(x: torch.Tensor, q: FourBitTensor) -> torch.Tensor:
    """Return `x @ dequantize(q).T` without a graph, by bitsandbytes' fused kernel where that is faster.

    For a few rows on CUDA the packed weight goes straight into the product; for many, bitsandbytes dequantizes and
    calls cuBLAS.

    Args:
        x: (..., in_features), float32, float16 or bfloat16.
        q: Of shape (out_features, in_features).
    """
    if q.shape[-1] % q.blocksize or not x.numel():  # the fused kernels want rows of whole blocks, and some rows
        return x @ dequantize(q, x.dtype).T
    absmax: tuple[torch.Tensor | None, ...] = (q.absmax,)
    double: tuple[torch.Tensor | None, ...] = ()
    if q.absmax_scale is not None:
        absmax, double = (q.absmax_scale,), (q.absmax, _absmax_code(q.packed.device), q.absmax_offset)
    out: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x, q.packed.view(-1, 1), q.shape, *absmax, q.blocksize, q.quant_type, None, *double
    )
    return out


def _absmax(q: FourBitTensor) -> torch.Tensor:
    """(blocks,), float32."""
    if q.absmax_scale is None or q.absmax_offset is None:
        return q.absmax
    absmax: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
        q.absmax, q.absmax_scale, _absmax_code(q.absmax.device), ABSMAX_BLOCKSIZE, torch.float32
    )
    return absmax.add_(q.absmax_offset)


@cache
def _absmax_code(device: torch.device) -> torch.Tensor:
    """The 256-entry table of the 8-bit absmax values, made once per device."""
    code: torch.Tensor = create_dynamic_map().to(device)
    return code

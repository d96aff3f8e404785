"""A tensor stored in 4 bits per value: quantize, dequantize, multiply. The only door to bitsandbytes' quantization.

A float tensor is read in row-major order and cut into blocks of `blocksize` values. Each value x of a block becomes
the index of the nearest entry of a 16-entry table (NF4: quantiles of a normal distribution, QLoRA, arXiv 2305.14314;
FP4: a 4-bit float) to x / absmax, two indices to a byte. With double quantization the float32 absmax values, less
their mean, are quantized again to 8 bits in blocks of 256:

    x ≈ table[index] · (code[absmax] · absmax_scale + absmax_offset)

That makes 4 + 32 / blocksize bits per value, or 4 + 8 / blocksize + 32 / (256 · blocksize) with double quantization
(4.127 at blocksize 64).

The layout is bitsandbytes' own, held in plain tensors rather than in its `Params4bit`: those move, save, load and
trace like any other tensor. On a CPU values are quantized here, bit for bit as there, where it takes six times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from qosora.compat.bitsandbytes import (
    create_dynamic_map,
    dequantize_4bit,
    dequantize_blockwise,
    gemm_4bit,
    get_4bit_type,
    launching,
    quantize_4bit,
    quantize_blockwise,
)
from qosora.decompose.kinds import BLOCKSIZES, QUANT_TYPES
from qosora.decompose.threads import panels, parallel_map, reproducible

__all__ = [
    "BLOCKSIZES",
    "FIELDS",
    "QUANT_TYPES",
    "FourBitTensor",
    "absmax_code",
    "code_table",
    "columns",
    "dequantize",
    "dequantize_all",
    "matmul",
    "quantize",
    "rows",
    "squared_error",
    "squared_norm",
    "stored_shapes",
]

#: The tensors that a `FourBitTensor` is stored as; the last two with double quantization only.
FIELDS = ("packed", "absmax", "absmax_scale", "absmax_offset")
#: Block of the second quantization; fixed in bitsandbytes' kernels.
ABSMAX_BLOCKSIZE = 256
#: Values that one thread quantizes at a time: few enough to stay in its cache.
PANEL = 2**17
#: Half the number of cells that [-1, 1] is cut into, to look up a value's code.
HALF = 2.0**15
#: Marks a cell in which the code changes.
SPLIT = 0x80
#: The same in each byte of an int64.
_SPLITS = int.from_bytes(bytes([SPLIT] * 8), "big", signed=True)


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
        return {name: t for name in FIELDS if (t := getattr(self, name)) is not None}

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


@reproducible
def quantize(
    tensor: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> FourBitTensor:
    """Quantize a tensor to 4 bits per value, as bitsandbytes does, bit for bit (on a CPU: as it does on one thread).

    Args:
        tensor: Any shape; float32, float16 or bfloat16. Must be finite.
        quant_type: "nf4" or "fp4".
        blocksize: Values per block, one of `BLOCKSIZES`.
        double_quant: Whether to quantize the blocks' absmax values again, to 8 bits.
    """
    scale = offset = None
    with launching(tensor):
        packed, absmax = (_quantize_cpu if tensor.device.type == "cpu" else _quantize)(tensor, quant_type, blocksize)
        if double_quant:
            offset = absmax.mean()
            code = absmax_code(tensor.device)
            absmax, scale = quantize_blockwise(absmax - offset, code, ABSMAX_BLOCKSIZE)
    return FourBitTensor(packed, absmax, scale, offset, tuple(tensor.shape), quant_type, blocksize)


def _quantize(tensor: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `packed` and the float32 `absmax`."""
    packed, absmax = quantize_4bit(tensor.contiguous(), blocksize, quant_type, torch.uint8)
    return _zeros_kept(packed.view(-1), absmax, quant_type, blocksize), absmax


def _zeros_kept(packed: torch.Tensor, absmax: torch.Tensor, quant_type: str, blocksize: int) -> torch.Tensor:
    """Write the code of 0 into blocks of zeros, in place.

    CUDA's kernel computes 0 · 1/0 there, and a NaN falls through its comparisons to the code of -1. With double
    quantization the block's absmax may come back as a small number other than 0, and its values with it.
    """
    table = code_table(quant_type, torch.device("cpu"))
    zero = int(table.abs().argmin())
    return packed.masked_fill_((absmax == 0).repeat_interleave(blocksize // 2)[: len(packed)], 17 * zero)


def _quantize_cpu(tensor: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_quantize` returns, about six times faster than bitsandbytes' CPU kernel."""
    shapes = stored_shapes(tensor.numel(), blocksize, double_quant=False)
    packed, absmax = (torch.empty(shape, dtype=dtype) for shape, dtype in shapes.values())
    matrix = tensor.reshape(-1, tensor.shape[-1])

    def quantize_panel(rows: slice) -> None:
        x = matrix[rows].float().reshape(-1)
        start, whole = rows.start * matrix.shape[1], x.numel() // blocksize * blocksize
        here = _stored(start, start + whole, blocksize)
        _quantize_blocks(x[:whole].view(-1, blocksize), quant_type, packed[here.packed], absmax[here.absmax])
        if whole < x.numel():  # the tensor ends inside a block
            rest = _quantize(x[whole:], quant_type, blocksize)
            packed[here.packed.stop :], absmax[here.absmax.stop :] = rest

    parallel_map(quantize_panel, _row_panels(matrix, blocksize))
    return packed, absmax


def _quantize_blocks(x: torch.Tensor, quant_type: str, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantize whole blocks into `packed` and `absmax`.

    Args:
        x: (blocks, blocksize), float32.
        quant_type: "nf4" or "fp4".
        packed: (x.numel() / 2,), uint8, written.
        absmax: (blocks,), float32, written.
    """
    order, bounds, cells = _code_cells(quant_type)
    scaled = x.abs()
    torch.amax(scaled, 1, out=absmax)
    inverse = (1.0 / absmax.clamp(min=1e-38))[:, None]  # bitsandbytes' own rounding
    torch.mul(x, inverse, out=scaled)
    codes = cells.index_select(0, _cell(scaled.view(-1)))
    split = (codes.view(torch.int64) & _SPLITS).nonzero().view(-1)  # among eight codes at a time: few are
    if len(split):
        exact = x.view(-1, 8)[split] * inverse[split // (x.shape[1] // 8)]
        codes.view(-1, 8)[split] = order[torch.bucketize(exact, bounds)]
    # Two codes of a byte each, a + 256 b in an int16: times 4097, its high byte is 16 a + b.
    packed.copy_((codes.view(torch.int16) * 4097) >> 8)


def _cell(scaled: torch.Tensor) -> torch.Tensor:
    """Return the cells, int32, of values in [-1, 1] or a rounding error beyond: monotone. Overwrites the values."""
    return scaled.mul_(HALF).add_(HALF).int()


@cache
def _code_cells(quant_type: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes in the order of what they mean, the 15 midpoints between, and the code of each cell.

    A value's code is that of its cell unless a midpoint lies in the same cell, which is marked with `SPLIT`.
    """
    table = code_table(quant_type, torch.device("cpu"))
    order = table.argsort()
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    order = order.to(torch.uint8)
    cells, split = torch.arange(2 * int(HALF) + 1, dtype=torch.int32), _cell(bounds.clone())
    below, up_to = torch.bucketize(cells, split), torch.bucketize(cells, split, right=True)
    return order, bounds, order[below] | torch.where(below < up_to, SPLIT, 0).to(torch.uint8)


@reproducible
def squared_error(tensor: torch.Tensor, q: FourBitTensor, scale: torch.Tensor | None = None) -> float:
    """Return the squared Frobenius norm of `(tensor - dequantize(q)) · scale`, without a copy of either.

    Args:
        tensor: Of shape `q.shape`; float32, float16 or bfloat16.
        q: On the same device.
        scale: Of the last dimension, float32; 1 by default.
    """
    matrix = tensor.reshape(-1, tensor.shape[-1])
    absmax = _absmax(q)

    def error(rows: slice) -> float:
        x = matrix[rows].float().reshape(-1)
        start = rows.start * matrix.shape[1]
        here = _stored(start, start + x.numel(), q.blocksize)
        part = replace(
            q, packed=q.packed[here.packed], absmax=absmax[here.absmax], absmax_scale=None, shape=(x.numel(),)
        )
        difference = dequantize(part).sub_(x)
        return squared_norm(difference if scale is None else difference.view(-1, matrix.shape[1]).mul_(scale))

    return math.fsum(parallel_map(error, _row_panels(matrix, q.blocksize)))


def squared_norm(panel: torch.Tensor) -> float:
    """Return the sum of squares of a panel of a tensor: in float32, and in float64 where that is out of range."""
    total = float(panel.square().sum(dtype=torch.float32))
    if not 1e-20 < total < 1e30:
        total = float(panel.double().square().sum())
    return total


class _Stored(NamedTuple):
    """Where a run of values is stored."""

    packed: slice
    absmax: slice


def _stored(start: int, stop: int, blocksize: int) -> _Stored:
    """Where the values from `start`, a multiple of the block's size, to `stop` are stored."""
    return _Stored(slice(start // 2, -(-stop // 2)), slice(start // blocksize, -(-stop // blocksize)))


def _row_panels(matrix: torch.Tensor, blocksize: int) -> list[slice]:
    """Cut a matrix into panels of rows that end where blocks end."""
    step = blocksize // math.gcd(matrix.shape[1], blocksize)
    return panels(matrix.shape[0], max(1, PANEL // (step * matrix.shape[1])) * step, matrix.device)


def dequantize(q: FourBitTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the tensor of shape `q.shape` in `dtype` (float32, float16 or bfloat16)."""
    shape, numel = q.shape, math.prod(q.shape)
    # bitsandbytes' CPU kernel takes wrong absmax values where a row ends inside a block (0.50.2; (3, 16) at blocksize
    # 32), and for odd rows compiles a fallback, for seconds. As one even row the values are right, on one thread.
    if shape[-1] % q.blocksize:
        shape = (numel + numel % 2,)
    out: torch.Tensor = dequantize_4bit(q.packed, _absmax(q), q.blocksize, q.quant_type, shape, dtype)
    return out.view(-1)[:numel].view(q.shape)  # the kernel returns a vector as a matrix of one row


def dequantize_all(tensors: Sequence[FourBitTensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return tensors of one shape and storage, (tensors, *shape), bit for bit as `dequantize` gives each.

    Args:
        tensors: At least one.
        dtype: float32, float16 or bfloat16.
    """
    first = tensors[0]
    if math.prod(first.shape) % first.blocksize:  # a block of the whole would hold values of two
        return torch.stack([dequantize(q, dtype) for q in tensors])
    absmax = torch.stack([q.absmax for q in tensors])
    if first.absmax_scale is not None:
        scales, offsets = zip(*((q.absmax_scale, q.absmax_offset) for q in tensors), strict=True)
        scale = torch.stack(scales).repeat_interleave(ABSMAX_BLOCKSIZE, 1)[:, : absmax.shape[1]]
        absmax = absmax_code(absmax.device)[absmax.int()].mul_(scale).add_(torch.stack(offsets)[:, None])
    shape = (len(tensors) * first.shape[0], *first.shape[1:])
    packed = torch.cat([q.packed for q in tensors])
    whole = replace(first, packed=packed, absmax=absmax.view(-1), absmax_scale=None, absmax_offset=None, shape=shape)
    return dequantize(whole, dtype).view(len(tensors), *first.shape)


def rows(q: FourBitTensor, index: slice | torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return some rows of a matrix whose rows are whole blocks: (rows, q.shape[1]), bit for bit those of `dequantize`.

    Args:
        q: Of two dimensions.
        index: A slice without a step, or int64 numbers, (rows,).
        dtype: float32, float16 or bfloat16.

    Raises:
        IndexError: On a CPU: a number is none of a row's. On a GPU an assertion of the device fails.
    """
    height, width = q.shape
    if width % q.blocksize:
        raise ValueError(f"rows of {width} values are no whole blocks of {q.blocksize}")
    packed, absmax = _taken(q.packed.view(height, -1), index), _taken(q.absmax.view(height, -1), index)
    part = replace(
        q, packed=packed.reshape(-1), absmax=absmax.reshape(-1), absmax_scale=None, absmax_offset=None,
        shape=(len(packed), width),
    )  # fmt: skip
    if q.absmax_scale is not None and q.absmax_offset is not None:
        blocks = _taken(torch.arange(len(q.absmax), device=absmax.device).view(height, -1), index).reshape(-1)
        decoded = absmax_code(absmax.device)[part.absmax.int()]
        scale = q.absmax_scale[blocks.div(ABSMAX_BLOCKSIZE, rounding_mode="floor")]
        part = replace(part, absmax=decoded.mul_(scale).add_(q.absmax_offset))
    return dequantize(part, dtype)


def _taken(matrix: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
    """Return some rows; unlike `matrix[index]`, negative numbers are refused as an embedding refuses them."""
    return matrix[index] if isinstance(index, slice) else matrix.index_select(0, index)


def columns(q: FourBitTensor, index: slice | torch.Tensor) -> torch.Tensor:
    """Return some columns of a matrix: (q.shape[0], columns), float32, bit for bit those of `dequantize`.

    Args:
        q: Of two dimensions.
        index: A slice without a step, or int64 numbers, (columns,).
    """
    height, width = q.shape
    device = q.packed.device
    chosen = torch.arange(width, device=device)[index]
    places = torch.arange(0, height * width, width, device=device)[:, None] + chosen
    both = q.packed[places >> 1].int()
    codes = torch.where(places & 1 == 0, both >> 4, both & 15)
    return code_table(q.quant_type, device)[codes].mul_(_absmax(q)[places // q.blocksize])


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
        absmax, double = (q.absmax_scale,), (q.absmax, absmax_code(q.packed.device), q.absmax_offset)
    out: torch.Tensor = gemm_4bit(x, q.packed.view(-1, 1), q.shape, *absmax, q.blocksize, q.quant_type, None, *double)
    return out


def _absmax(q: FourBitTensor) -> torch.Tensor:
    """(blocks,), float32."""
    if q.absmax_scale is None or q.absmax_offset is None:
        return q.absmax
    absmax: torch.Tensor = dequantize_blockwise(
        q.absmax, q.absmax_scale, absmax_code(q.absmax.device), ABSMAX_BLOCKSIZE, torch.float32
    )
    return absmax.add_(q.absmax_offset)


@cache
def code_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16-entry table of a type, float32, made once per device."""
    table: torch.Tensor = get_4bit_type(quant_type, device=device)
    return table


@torch.compiler.assume_constant_result
def absmax_code(device: torch.device) -> torch.Tensor:
    """The 256-entry table of the 8-bit absmax values."""
    return _made_absmax_code(device)


@cache
def _made_absmax_code(device: torch.device) -> torch.Tensor:
    code: torch.Tensor = create_dynamic_map().to(device)
    return code

"""What `QosoraLinear` does with 4-bit tensors: in plain PyTorch, or inside of `fused()` in one CUDA launch each.

    dequantize          the tensor                                                   else 3 launches
    scaled_U            B = diag(s) Uᵀ diag(o), rounded once                         else 6
    vector_gradients    ds = rowsum(P ⊙ Uᵀ ⊙ o), do = colsum(P ⊙ Uᵀ ⊙ s)              2, else 6
    add_low_rank_       y += h B + b, for a few rows straight from the packed U      else 8

The plain code is the definition, and what is on by default. The kernels decode and scale by the same float32
operations in the same order, so `dequantize` and `scaled_U` give the same bits; sums differ in the order of additions.
No kernel uses atomic additions: a run gives the same bits each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qosora.decompose import FourBitTensor, nf4
from qosora.errors import QosoraError

__all__ = ["add_low_rank_", "dequantize", "device_of", "fused", "meta_as", "scaled_U", "vector_gradients"]

#: More rows than this multiply by a matrix B that is made once.
FEW_ROWS = 16
#: Rows, or runs, of 32 values that four warps have in work at a time: 16 values to a thread.
ROWS = 64

#: `triton_ops` inside of `fused()`, else None. Of the process: CUDA's backward runs on a thread of its own.
_kernels: Any = None
#: What tensors on the meta device stand for; of the process, too.
_meta_is = "cpu"


@contextmanager
def fused() -> Iterator[None]:
    """Use the fused Triton kernels in the whole process, forward and backward, until the block is left.

    They are off by default, and nothing in qosora turns them on: whether they are faster than the plain code has not
    been measured. `python benchmarks/gpu/run_all.py --only kernels` measures it on your GPU.

    Raises:
        QosoraError: triton cannot be imported. Within the block: a tensor is not on a CUDA device.

    Example:
        >>> with kernels.fused():  # doctest: +SKIP
        ...     trainer.train()
    """
    global _kernels
    try:
        from qosora.layers import triton_ops
    except ImportError as error:
        raise QosoraError(
            f"the fused kernels need triton, which cannot be imported here ({error}): install it (a CUDA build of "
            "torch brings it on Linux), or leave the kernels off, as they are by default"
        ) from error
    before, _kernels = _kernels, triton_ops
    try:
        yield
    finally:
        _kernels = before


@contextmanager
def meta_as(device: str) -> Iterator[None]:
    """Let tensors on the meta device take the ways of another's, in the whole process, until the block is left.

    A planner traces on the meta device what a step takes on a GPU, and there it is another product that is chosen.

    Args:
        device: "cuda" or "cpu", which it is outside of all blocks.
    """
    global _meta_is
    before, _meta_is = _meta_is, device
    try:
        yield
    finally:
        _meta_is = before


def device_of(tensor: torch.Tensor) -> str:
    """Return the type of device whose ways a tensor takes."""
    return _meta_is if tensor.is_meta else tensor.device.type


def dequantize(q: FourBitTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the tensor of shape `q.shape` in `dtype` (float32, float16 or bfloat16)."""
    return nf4.dequantize(q, dtype) if _kernels is None else _dequantize(q, None, None, dtype)


def scaled_U(U: FourBitTensor, s: torch.Tensor, o: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return B = diag(s) Uᵀ diag(o), scaled in float32 and rounded once.

    Args:
        U: Uᵀ, (rank, out_features).
        s: (rank,), float32.
        o: (out_features,), float32.
        dtype: Of the result.
    """
    if not _fused_for(U):
        return nf4.dequantize(U).mul_(s[:, None]).mul_(o).to(dtype)
    return _dequantize(U, s.contiguous(), o.contiguous(), dtype)


def _dequantize(q: FourBitTensor, s: torch.Tensor | None, o: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    programs = -(-out.numel() // (ROWS * _kernels.RUN.value))
    _launch(_kernels.dequantize, programs, q, out, out.numel(), s, o, q.shape[-1], RUNS=ROWS)
    return out


def vector_gradients(
    P: torch.Tensor, U: FourBitTensor, s: torch.Tensor, o: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of s and o, (rank,) and (out_features,), float32.

    Args:
        P: hᵀG, (rank, out_features), float32. May be overwritten.
        U: Uᵀ, (rank, out_features).
        s: (rank,), float32.
        o: (out_features,), float32.
    """
    if not _fused_for(U):
        P.mul_(nf4.dequantize(U))
        return P @ o, s @ P
    r, m = P.shape
    strips = m // _kernels.RUN.value
    operands = (P.contiguous(), s.contiguous(), o.contiguous())
    ds_parts, do = P.new_empty(strips, r), P.new_empty(m)
    _launch(_kernels.vector_gradients, strips, U, *operands, ds_parts, do, r, m, ROWS=ROWS)
    return ds_parts.sum(0), do


def add_low_rank_(
    y: torch.Tensor,
    h: torch.Tensor,
    U: FourBitTensor,
    s: torch.Tensor,
    o: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Add o ⊙ U (s ⊙ h) + b to y, in place.

    The plain code rounds B, and y after each of the two additions; the kernel rounds y once, and nothing else.

    Args:
        y: (rows, out_features), float32, float16 or bfloat16.
        h: Vᵀx, (rows, rank), dtype of y.
        U: Uᵀ, (rank, out_features).
        s: (rank,), float32.
        o: (out_features,), float32.
        bias: (out_features,), dtype of y.
    """
    if not _fused_for(U) or len(y) > FEW_ROWS or not y.is_contiguous():
        y.addmm_(h, scaled_U(U, s, o, y.dtype))
        if bias is not None:
            y += bias
        return
    (rows, m), r = y.shape, len(s)
    rank = 1 << (r - 1).bit_length()
    operands = (h.contiguous(), s.contiguous(), o.contiguous(), None if bias is None else bias.contiguous())
    warps = min(max(rank // 16, 1), 8)  # 16 values of U to a thread, so to a register, up to a rank of 128
    _launch(_kernels.add_low_rank, m // _kernels.RUN.value, U, y, *operands, rows, r, m, RANK=rank, warps=warps)


def _fused_for(U: FourBitTensor) -> bool:
    """Say whether the kernels are on, and can take a factor: with rows of whole runs, as all but odd models have."""
    return _kernels is not None and U.shape[-1] % _kernels.RUN.value == 0


def _launch(kernel: Any, programs: int, q: FourBitTensor, *args: Any, warps: int = 4, **constants: int) -> None:
    """Run a kernel on the device that a 4-bit tensor is on."""
    device = q.packed.device
    if device.type != "cuda" and not _kernels.INTERPRETED:
        raise QosoraError(
            f"the fused kernels run on CUDA devices, got a tensor on {device.type!r}: move the model to a CUDA device, "
            "or leave `qosora.layers.ops.fused()`"
        )
    code = None if q.absmax_scale is None else nf4.absmax_code(device)
    stored = (
        q.packed,
        q.absmax,
        q.absmax_scale,
        q.absmax_offset,
        code,
        nf4.code_table(q.quant_type, device),
        q.packed.numel(),
    )
    with torch.cuda.device_of(q.packed):  # type: ignore[no-untyped-call]
        # Without fp fusion: absmax's product and sum, rounded once instead of twice, would not be the plain code's.
        kernel[(programs,)](*stored, *args, BLOCKSIZE=q.blocksize, **constants, num_warps=warps, enable_fp_fusion=False)

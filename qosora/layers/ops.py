"""What `QosoraLinear` does with 4-bit tensors: in plain PyTorch, or in one launch of a Triton kernel each.

    dequantize          the tensor                                                   1 launch, else 3
    scaled_U            B = diag(s) Uᵀ diag(o), rounded once                         1, else 6
    vector_gradients    ds = rowsum(P ⊙ Uᵀ ⊙ o), do = colsum(P ⊙ Uᵀ ⊙ s)              2, else 6
    add_low_rank_       y += h B + b, for a few rows straight from the packed U      1, else 8

The plain code is the definition, and runs on all devices. The kernels run on NVIDIA GPUs where Triton works: on an H200
a call takes 0.4 to 0.8 of the plain code's time, and the kernel itself 0.2 to 0.9. Which of the two runs is never a
matter of timing at run time: their sums differ in the order of additions, so a resumed run might then give other bits
than an uninterrupted one. The kernels decode and scale by the same float32 operations in the same order, so
`dequantize` and `scaled_U` give the same bits. No kernel uses atomic additions: a run gives the same bits each time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qosora.decompose import BLOCKSIZES, FourBitTensor, nf4
from qosora.errors import QosoraError, first_line
from qosora.layers.device import device_type

__all__ = [
    "add_low_rank_",
    "dequantize",
    "fused",
    "gradients_and_scaled_U",
    "scale_rows_and_columns",
    "scaled_U",
    "vector_gradients",
    "why_unfused",
]

logger = logging.getLogger("qosora")

#: More rows than this multiply by a matrix B that is made once: with 16, the kernel took up to twice as long (H200).
FEW_ROWS = 8
#: Rows, or runs, of 32 values that four warps have in work at a time: 16 values to a thread.
ROWS = 64
#: Values that the kernels decode together: those lie in one block, whatever its size.
RUN = min(BLOCKSIZES)

#: What `fused` asks for, in the whole process: CUDA's backward runs on a thread of its own. None outside of it.
_wanted: bool | None = None


@contextmanager
def fused(enabled: bool = True) -> Iterator[None]:
    """Insist on the Triton kernels, or on the plain code, forward and backward, until the block is left.

    Without it the kernels run on NVIDIA GPUs where Triton works, and the plain code elsewhere.

    Args:
        enabled: False for the plain code.

    Raises:
        QosoraError: triton cannot be imported. Within the block: a tensor is not on a CUDA device.

    Example:
        >>> with fused(False):  # doctest: +SKIP
        ...     trainer.train()
    """
    global _wanted
    if enabled:
        _triton()
    before, _wanted = _wanted, enabled
    try:
        yield
    finally:
        _wanted = before


def _triton() -> Any:
    """Return the module of the kernels."""
    try:
        from qosora.layers import triton_ops
    except ImportError as error:
        raise QosoraError(
            f"the fused kernels need triton, which cannot be imported here ({error}): install it (a CUDA build of "
            "torch brings it on Linux), or leave the choice to qosora, which then takes the plain code"
        ) from error
    return triton_ops


def _fused_for(q: FourBitTensor) -> bool:
    """Say whether the kernels are to take a tensor."""
    return device_type(q.packed) == "cuda" and _working() if _wanted is None else _wanted


@functools.cache
def _working() -> bool:
    """Say whether the kernels work on the GPU here; True for a GPU elsewhere."""
    reason = why_unfused() if torch.cuda.is_available() else None
    if reason is not None:
        logger.warning("steps take longer without the fused kernels, which do not work here: %s", reason)
    return reason is None


def why_unfused() -> str | None:
    """Return why the kernels do not run, in a line, or None where Triton makes a right one for the GPU here."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        q = nf4.quantize(torch.linspace(-1, 1, 4 * RUN, device="cuda").view(2, -1), blocksize=RUN)
        with fused():
            equal = torch.version.hip is None and torch.equal(dequantize(q), nf4.dequantize(q))
    except Exception as error:  # whatever Triton, a missing compiler or the driver raises
        return first_line(error)
    return None if equal else "they give other numbers on this GPU"


def dequantize(q: FourBitTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the tensor of shape `q.shape` in `dtype` (float32, float16 or bfloat16)."""
    return _dequantize(q, None, None, dtype) if _fused_for(q) else nf4.dequantize(q, dtype)


def scaled_U(U: FourBitTensor, s: torch.Tensor, o: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return B = diag(s) Uᵀ diag(o), scaled in float32 and rounded once.

    Args:
        U: Uᵀ, (rank, out_features).
        s: (rank,), float32.
        o: (out_features,), float32.
        dtype: Of the result.
    """
    if not _fused_rows(U):
        return scale_rows_and_columns(nf4.dequantize(U), s, o, dtype)
    return _dequantize(U, s.contiguous(), o.contiguous(), dtype)


def scale_rows_and_columns(U: torch.Tensor, s: torch.Tensor, o: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return B of decoded values, (..., rank, out_features) float32, which are overwritten; see `scaled_U`."""
    return U.mul_(s[..., None]).mul_(o[..., None, :]).to(dtype)


def _dequantize(q: FourBitTensor, s: torch.Tensor | None, o: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    programs = -(-out.numel() // (ROWS * RUN))
    _launch("dequantize", programs, q, out, out.numel(), s, o, q.shape[-1], RUNS=ROWS)
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
    if not _fused_rows(U):
        return _plain_vector_gradients(P, nf4.dequantize(U), s, o)
    r, m = P.shape
    strips = m // RUN
    operands = (P.contiguous(), s.contiguous(), o.contiguous())
    ds_parts, do = P.new_empty(strips, r), P.new_empty(m)
    _launch("vector_gradients", strips, U, *operands, ds_parts, do, r, m, ROWS=ROWS)
    return ds_parts.sum(0), do


def _plain_vector_gradients(
    P: torch.Tensor, U: torch.Tensor, s: torch.Tensor, o: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    P.mul_(U)
    return P @ o, s @ P


def gradients_and_scaled_U(
    P: torch.Tensor, U: FourBitTensor, s: torch.Tensor, o: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `vector_gradients` and `scaled_U` do; the plain code decodes U once for both.

    Args:
        P: hᵀG, (rank, out_features), float32. May be overwritten.
        U: Uᵀ, (rank, out_features).
        s: (rank,), float32.
        o: (out_features,), float32.
        dtype: Of B.
    """
    if _fused_rows(U):
        return *vector_gradients(P, U, s, o), scaled_U(U, s, o, dtype)
    values = nf4.dequantize(U)
    ds, do = _plain_vector_gradients(P, values, s, o)
    return ds, do, scale_rows_and_columns(values, s, o, dtype)


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
    if not _fused_rows(U) or len(y) > FEW_ROWS or not y.is_contiguous():
        y.addmm_(h, scaled_U(U, s, o, y.dtype))
        if bias is not None:
            y += bias
        return
    (rows, m), r = y.shape, len(s)
    rank = 1 << (r - 1).bit_length()
    operands = (h.contiguous(), s.contiguous(), o.contiguous(), None if bias is None else bias.contiguous())
    warps = min(max(rank // 16, 1), 8)  # 16 values of U to a thread, so to a register, up to a rank of 128
    _launch("add_low_rank", m // RUN, U, y, *operands, rows, r, m, RANK=rank, warps=warps)


def _fused_rows(U: FourBitTensor) -> bool:
    """Say whether the kernels are to take a factor, and can: with rows of whole runs, as all but odd models have."""
    return U.shape[-1] % RUN == 0 and _fused_for(U)


def _launch(kernel: str, programs: int, q: FourBitTensor, *args: Any, warps: int = 4, **constants: int) -> None:
    """Run a kernel on the device that a 4-bit tensor is on; where it only stands for one, do nothing."""
    device = q.packed.device
    if device.type == "meta" and device_type(q.packed) == "cuda":
        return
    kernels = _triton()
    if device.type != "cuda" and not kernels.INTERPRETED:
        raise QosoraError(
            f"the fused kernels run on CUDA devices, got a tensor on {device.type!r}: move the model to a CUDA device, "
            "or leave the block of `qosora.fused()`"
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
        getattr(kernels, kernel)[(programs,)](
            *stored, *args, BLOCKSIZE=q.blocksize, **constants, num_warps=warps, enable_fp_fusion=False
        )

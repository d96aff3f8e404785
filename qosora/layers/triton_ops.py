"""The Triton kernels that `qosora.layers.ops` launches. Importing this module imports triton.

All decode a `FourBitTensor` in runs of 32 values: those lie in one block, whatever its size, so a thread takes several
bytes at once and their absmax once. Tables are looked up in memory: they stay in the first-level cache, and NF4 and
FP4 share the code. The first arguments of all kernels:

    packed         (packed_bytes,) uint8
    absmax         (blocks,) uint8 with double quantization, float32 without
    absmax_scale   (ceil(blocks / 256),) float32, or None without double quantization
    absmax_offset  () float32, or None likewise
    absmax_code    (256,) float32, or None likewise
    table          (16,) float32, by code
"""

# mypy: disable-error-code="no-untyped-def"
# Tensors arrive as pointers, for which there is no type.

from __future__ import annotations

import triton
import triton.language as tl

from qosora.decompose import ABSMAX_BLOCKSIZE, BLOCKSIZES

__all__ = ["INTERPRETED", "RUN", "add_low_rank", "dequantize", "vector_gradients"]

#: Whether the kernels run in Triton's interpreter, on a CPU: TRITON_INTERPRET was set when triton was imported.
INTERPRETED = triton.knobs.runtime.interpret
#: Values decoded together.
RUN = tl.constexpr(min(BLOCKSIZES))

_ABSMAX_BLOCKSIZE = tl.constexpr(ABSMAX_BLOCKSIZE)


@triton.jit
def dequantize(
    packed,
    absmax,
    absmax_scale,
    absmax_offset,
    absmax_code,
    table,
    packed_bytes,
    out,  # (numel,)
    numel,
    s,  # (r,) float32, or None
    o,  # (m,) float32, or None
    m,
    BLOCKSIZE: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Write RUNS runs of the tensor; given s and o, of diag(s) Uᵀ diag(o), for U with rows of whole runs."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    value = _decode(run, packed, absmax, absmax_scale, absmax_offset, absmax_code, table, packed_bytes, BLOCKSIZE)
    if s is not None:
        first = run.to(tl.int32) * RUN  # division in 64 bits is slow, and factors are small
        column = (first % m)[:, None] + tl.arange(0, RUN)[None, :]
        value = value * tl.load(s + first // m, mask=first < numel, other=0.0)[:, None] * tl.load(o + column)
    at = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < numel)


@triton.jit
def vector_gradients(
    packed,
    absmax,
    absmax_scale,
    absmax_offset,
    absmax_code,
    table,
    packed_bytes,
    P,  # (r, m) float32
    s,  # (r,) float32
    o,  # (m,) float32
    ds_parts,  # (m / RUN, r) float32, written
    do,  # (m,) float32, written
    r,
    m,
    BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Go down a strip of RUN columns of P: write their entries of do, and the strip's part of ds."""
    strip = tl.program_id(0)
    column = strip * RUN + tl.arange(0, RUN)
    o_here = tl.load(o + column)
    do_here = tl.zeros([RUN], tl.float32)
    for first in range(0, r, ROWS):
        k = first + tl.arange(0, ROWS)
        run = k * (m // RUN) + strip
        U = _decode(run, packed, absmax, absmax_scale, absmax_offset, absmax_code, table, packed_bytes, BLOCKSIZE)
        product = tl.load(P + k[:, None] * m + column[None, :], mask=(k < r)[:, None], other=0.0) * U
        tl.store(ds_parts + strip * r + k, tl.sum(product * o_here[None, :], 1), mask=k < r)
        do_here += tl.sum(product * tl.load(s + k, mask=k < r, other=0.0)[:, None], 0)
    tl.store(do + column, do_here)


@triton.jit
def add_low_rank(
    packed,
    absmax,
    absmax_scale,
    absmax_offset,
    absmax_code,
    table,
    packed_bytes,
    y,  # (rows, m), updated
    h,  # (rows, r)
    s,  # (r,) float32
    o,  # (m,) float32
    bias,  # (m,), or None
    rows,
    r,
    m,
    BLOCKSIZE: tl.constexpr,
    RANK: tl.constexpr,  # a power of two, at least r
):
    """Update RUN columns of y; their part of U is decoded once and stays in registers for all rows."""
    strip = tl.program_id(0)
    column = strip * RUN + tl.arange(0, RUN)
    k = tl.arange(0, RANK)
    run = k * (m // RUN) + strip
    U = _decode(run, packed, absmax, absmax_scale, absmax_offset, absmax_code, table, packed_bytes, BLOCKSIZE)
    U_s = U * tl.load(s + k, mask=k < r, other=0.0)[:, None]
    o_here = tl.load(o + column)
    for row in range(rows):
        h_row = tl.load(h + row * r + k, mask=k < r, other=0.0).to(tl.float32)
        y_row = y + row * m + column
        total = tl.load(y_row).to(tl.float32) + tl.sum(U_s * h_row[:, None], 0) * o_here
        if bias is not None:
            total += tl.load(bias + column).to(tl.float32)
        tl.store(y_row, total.to(y.dtype.element_ty))


@triton.jit
def _decode(
    run, packed, absmax, absmax_scale, absmax_offset, absmax_code, table, packed_bytes, BLOCKSIZE: tl.constexpr
):
    """Return the values of runs, (len(run), RUN) float32; finite numbers beyond the tensor's end."""
    at = run[:, None] * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    byte = tl.load(packed + at, mask=at < packed_bytes, other=0).to(tl.int32)
    value = tl.interleave(tl.load(table + (byte >> 4)), tl.load(table + (byte & 15)))
    block, inside = run // (BLOCKSIZE // RUN), run * (RUN // 2) < packed_bytes
    largest = tl.load(absmax + block, mask=inside, other=0)
    if absmax_scale is not None:
        scale = tl.load(absmax_scale + block // _ABSMAX_BLOCKSIZE, mask=inside, other=0.0)
        code = tl.load(absmax_code + largest.to(tl.int32))  # as an index of 8 bits it would be taken for a signed one
        largest = code * scale + tl.load(absmax_offset)
    return value * largest[:, None]

"""The products of many small layers, as those of a mixture's experts: their weights are decoded together.

Alone each expert decodes three parts, scales its inputs and gathers its gradients: on a GPU some forty launches for a
product that takes less time than they do. Together they take as many for all that fit `DECODED_BYTES`, and a product
each. The numbers are those of `QosoraLinear.apply_vectors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qosora.decompose import FourBitTensor, nf4
from qosora.layers import ops
from qosora.layers.device import autocast_dtype, device_type, pieces
from qosora.layers.linear import Member, QosoraLinear, updated
from qosora.layers.product import no_autocast, product_float32

__all__ = ["DECODED_BYTES", "GROUPED_SINCE", "grouped_product", "members"]

#: Of the largest part of the layers that are decoded together, and of their inputs or outputs, if they are several.
DECODED_BYTES = 2**26
#: CUDA devices from which on torch has a grouped product that does not ask the host for the groups' sizes.
GROUPED_SINCE = (9, 0)
#: Of inputs that are scaled at a time, in float32.
_SCALED_BYTES = 2**23


def members(layers: Sequence[Any]) -> list[Member] | None:
    """Return what layers multiply by, or None where they cannot be computed together.

    Args:
        layers: Decomposed ones, with or without an adapter; others, those with a bias or of several ranks cannot.
    """
    if not all(hasattr(layer, "member") for layer in layers):
        return None
    found: list[Member] = [layer.member() for layer in layers]
    kind = found[0].alike
    return found if found[0].layer.bias is None and all(member.alike == kind for member in found) else None


def grouped_product(x: torch.Tensor, counts: Sequence[int], group: Sequence[Member]) -> torch.Tensor:
    """Return the outputs of layers, each on rows of its own: (T, m), differentiable in x and the vectors.

    Args:
        x: (T, n): the rows of the first layer, then those of the second, and so on.
        counts: How many rows are each layer's; each at least 1, T in all.
        group: As `members` gives them.
    """
    layer = group[0].layer
    layer.require_weights(x)
    autocast = autocast_dtype(x)
    out_dtype, dtype = autocast or x.dtype, autocast or layer.compute_dtype or x.dtype
    s, o = torch.stack([member.s for member in group]), torch.stack([member.o for member in group])
    y: torch.Tensor = _Grouped.apply(x, s, o, [m.layer for m in group], list(counts), dtype)  # type: ignore[no-untyped-call]
    y = y.to(out_dtype)
    if group[0].update is None:
        return y
    updates = filter(None, (member.update for member in group))
    rows = torch.split(x.to(y.dtype), list(counts))
    return y + torch.cat([updated(part, B, A) for part, (B, A) in zip(rows, updates, strict=True)])


class _Chunk(NamedTuple):
    """Layers that are decoded together.

    Attributes:
        layers: In their order.
        counts: Rows of each.
        rows: Of all layers' rows those of these.
        experts: Of all layers these.
    """

    layers: list[QosoraLinear]
    counts: list[int]
    rows: slice
    experts: slice


def _chunks(layers: list[QosoraLinear], counts: list[int], dtype: torch.dtype) -> Iterator[_Chunk]:
    n, m = layers[0].in_features, layers[0].out_features
    at_once, most_rows = (DECODED_BYTES // (numbers * dtype.itemsize) for numbers in (n * m, max(n, m)))
    ends, start = [0, *accumulate(counts)], 0
    for stop in range(1, len(layers) + 1):
        if stop < len(layers) and stop + 1 - start <= at_once and ends[stop + 1] - ends[start] <= most_rows:
            continue
        yield _Chunk(layers[start:stop], counts[start:stop], slice(ends[start], ends[stop]), slice(start, stop))
        start = stop


class _Grouped(torch.autograd.Function):
    """The outputs of layers; what `product._OsoraFunction` is for one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        s: torch.Tensor,
        o: torch.Tensor,
        layers: list[QosoraLinear],
        counts: list[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        y = x.new_empty(len(x), o.shape[1], dtype=dtype)
        h = x.new_empty(len(x), s.shape[1], dtype=dtype)
        for chunk in _chunks(layers, counts, dtype):
            inputs = _scaled(x[chunk.rows], chunk, dtype)
            projected, out = h[chunk.rows], y[chunk.rows]
            _multiply(inputs, _decoded(chunk, "V", dtype).mT, chunk.counts, projected)
            _multiply(inputs, _decoded(chunk, "residual", dtype).mT, chunk.counts, out)
            B = ops.scale_rows_and_columns(
                _decoded(chunk, "U", torch.float32), s[chunk.experts], o[chunk.experts], dtype
            )
            _multiply(projected, B, chunk.counts, out, add=True)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(h if trained else None, s, o)
        ctx.layers, ctx.counts, ctx.x_dtype = layers, counts, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, s, o = ctx.saved_tensors
        dx = g.new_empty(len(g), ctx.layers[0].in_features, dtype=ctx.x_dtype) if ctx.needs_input_grad[0] else None
        ds, do = (None, None) if h is None else (torch.empty_like(s), torch.empty_like(o))
        with no_autocast(g.device.type):
            for chunk in _chunks(ctx.layers, ctx.counts, g.dtype):
                here, vectors = g[chunk.rows], (s[chunk.experts], o[chunk.experts])
                U = _decoded(chunk, "U", torch.float32)
                if ds is not None and do is not None:
                    P = _products_float32(h[chunk.rows], here, chunk.counts).mul_(U)
                    ds[chunk.experts] = torch.bmm(P, vectors[1][:, :, None])[:, :, 0]
                    do[chunk.experts] = torch.bmm(vectors[0][:, None], P)[:, 0]
                    del P
                if dx is not None:
                    B = ops.scale_rows_and_columns(U, *vectors, g.dtype)
                    dh = here.new_empty(len(here), s.shape[1])
                    _multiply(here, B.mT, chunk.counts, dh)
                    del B, U
                    found = here.new_empty(len(here), dx.shape[1])
                    _multiply(here, _decoded(chunk, "residual", g.dtype), chunk.counts, found)
                    _multiply(dh, _decoded(chunk, "V", g.dtype), chunk.counts, found, add=True)
                    dx[chunk.rows] = _scaled(found, chunk, ctx.x_dtype)
        return dx, ds, do, None, None, None


def _decoded(chunk: _Chunk, part: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a part of each layer, (layers, ., .)."""
    found: list[FourBitTensor] = [getattr(layer.factors, part) for layer in chunk.layers]
    return nf4.dequantize_all(found, dtype)


def _scaled(x: torch.Tensor, chunk: _Chunk, dtype: torch.dtype) -> torch.Tensor:
    """Return c ⊙ x of each layer's rows, rounded once; x in that dtype where layers have no scale."""
    scales: list[torch.Tensor] = [layer.c for layer in chunk.layers if layer.c is not None]
    if not scales:
        return x.to(dtype)
    c, out = torch.stack(scales), x.new_empty(x.shape, dtype=dtype)
    # Which layer's each row is, from numbers that the host has.
    of = torch.from_numpy(np.repeat(np.arange(len(c)), chunk.counts)).to(x.device, non_blocking=True)
    at_once = max(1, _SCALED_BYTES // (4 * x.shape[1]))
    for rows in (slice(start, start + at_once) for start in pieces(range(0, len(x), at_once))):
        torch.mul(x[rows], c.index_select(0, of[rows]), out=out[rows])
    return out


def _multiply(a: torch.Tensor, b: torch.Tensor, counts: Sequence[int], out: torch.Tensor, *, add: bool = False) -> None:
    """Write each layer's rows of a times its matrix of b into its rows of `out`, or add them.

    Args:
        a: (rows, p).
        b: (layers, p, q).
        counts: Rows of each layer.
        out: (rows, q).
        add: Whether they are added.
    """
    if _has_grouped(a, b):
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32).to(a.device, non_blocking=True)
        found = F.grouped_mm(a, b, offs=ends)
        out.copy_(found.add_(out) if add else found)
        return
    for i, (start, stop) in enumerate(pairwise([0, *accumulate(counts)])):
        if add:
            out[start:stop].addmm_(a[start:stop], b[i])
        else:
            torch.mm(a[start:stop], b[i], out=out[start:stop])


def _has_grouped(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether torch's own grouped product is to be taken, which wants rows of whole 16 bytes."""
    if device_type(a) != "cuda" or a.dtype != torch.bfloat16 or a.is_meta or torch.version.hip is not None:
        return False
    return all(n % 8 == 0 for n in b.shape[1:]) and torch.cuda.get_device_capability(a.device) >= GROUPED_SINCE


def _products_float32(h: torch.Tensor, g: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return hᵀ g of each layer's rows, (layers, r, m), float32."""
    each = zip(torch.split(h, counts), torch.split(g, counts), strict=True)
    return torch.stack([product_float32(rows.T, grads) for rows, grads in each])

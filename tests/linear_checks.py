"""A decomposed layer against the float64 reference, for the tests of whatever computes it.

Tolerances here are bounds of rounding errors, computed per entry from the operands.

Model. A value a rounded to a dtype of unit roundoff u is off by at most u·max(|a|, tiny), with a sign that does not
depend on the sign of what it is multiplied with. The errors of the terms of a sum then add as the steps of a random
walk: Σ e_i exceeds λ·sqrt(Σ bound(e_i)²) with a probability below 2 exp(-λ²/2) (Hoeffding), below 4·10⁻⁸ for λ = 6. A
float32 sum of K products adds λ·sqrt(K)·2⁻²⁴·Σ|terms| (Higham and Mary 2019, theorem 2.4), however it is ordered.

What is rounded, with u the compute dtype's and v = 2⁻²⁴:

    R, V    decoded in float32 (3 roundings: absmax's product and sum, the value's product), then to the dtype: u + 3v
    B       = s U o scaled in float32: u + 5v
    h       a float32 sum, rounded: u
    y       two products, the bias, two sums, each at most rounded once: u of each
    P       rounded where it is a 16-bit product on a CPU: u
    c ⊙ x   u + v, where there is a scale; c ⊙ dx likewise

Recorded over 250 layers: the largest error of any entry is 0.3 of its tolerance in 16 bits and 0.03 in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import reference
import torch
from reference import array
from torch import Tensor

from qosora.decompose.factorize import factorize
from qosora.layers.linear import QosoraLinear

LAMBDA = 6.0
V32 = 2.0**-24  # unit roundoff of float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build(
    n: int,
    m: int,
    rank: int,
    *,
    bias: bool = True,
    seed: int = 0,
    compute_dtype: torch.dtype | None = None,
    device: str = "cpu",
    scale: str | None = None,
    **storage: Any,
) -> QosoraLinear:
    """A layer of a random weight, with s and o moved away from where they start; with a scale, of uneven columns."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator) / n**0.5
    if scale:
        weight *= torch.exp2(2 * torch.randn(n, generator=generator))
    factors = factorize(weight, rank, seed=seed, scale=scale, **storage)
    layer = QosoraLinear(n, m, bias, rank=rank, compute_dtype=compute_dtype, has_scale=bool(scale), **storage)
    layer.set_factors(factors)
    with torch.no_grad():
        layer.s.mul_(1 + 0.3 * torch.randn(layer.rank, generator=generator))
        layer.o.add_(0.3 * torch.randn(m, generator=generator))
        if bias:
            assert layer.bias is not None
            layer.bias.copy_(torch.randn(m, generator=generator))
    return layer.to(device)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grad(leaf: Tensor) -> Tensor:
    """Return a gradient that is there."""
    assert leaf.grad is not None
    return leaf.grad


def vectors(layer: QosoraLinear) -> tuple[Tensor, Tensor]:
    """Trainable copies of s and o, as an adapter holds them."""
    return layer.s.detach().clone().requires_grad_(), layer.o.detach().clone().requires_grad_()


class Expected(NamedTuple):
    """Values by the reference, and how far float arithmetic may be off, entry by entry."""

    y: np.ndarray
    dx: np.ndarray
    ds: np.ndarray
    do: np.ndarray
    y_tolerance: np.ndarray
    dx_tolerance: np.ndarray
    ds_tolerance: np.ndarray
    do_tolerance: np.ndarray


def expect(layer: QosoraLinear, inputs: Tensor, gradients: Tensor, dtype: torch.dtype) -> Expected:
    """Output and gradients for x (T, n) and dL/dy = g (T, m), products in `dtype`."""
    f = layer.factors
    (R, R_abs), (U, U_abs), (V, V_abs) = (reference.dequantize(q) for q in (f.residual, f.U, f.V))
    bias = None if layer.bias is None else array(layer.bias)
    model = reference.Layer(R, U, V, array(layer.s), array(layer.o), bias)
    c = 1.0 if layer.c is None else array(layer.c)
    x, g = array(inputs) * c, array(gradients)
    (T, n), (r, m) = x.shape, U.shape
    h, y = model.hidden(x), model.output(x)
    dx, ds, do = model.gradients(x, g)

    u, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny
    of_x = 0.0 if layer.c is None else u + V32
    stored, scaled = u + 3 * V32, u + 5 * V32

    def sq(a: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(a), tiny) ** 2

    def total(variance: np.ndarray, terms: int, magnitude: np.ndarray) -> np.ndarray:
        return LAMBDA * (np.sqrt(variance) + np.sqrt(terms) * V32 * magnitude)

    s_abs, o_abs = np.abs(model.s)[:, None], np.abs(model.o)
    B = U * model.s[:, None] * model.o
    B_abs, U_o, U_s = U_abs * s_abs * o_abs, U_abs * o_abs, U_abs * s_abs
    h_abs = np.abs(x) @ V_abs.T
    terms = n + m + r + T  # at least as many as any chain of sums below is long

    xR, hB, b = x @ R.T, h @ B, 0.0 if bias is None else bias
    outputs = sq(xR) + sq(xR + b) + sq(hB) + sq(y) + np.broadcast_to(np.square(b), y.shape)
    y_variance = (
        stored**2 * sq(x) @ sq(R_abs).T
        + stored**2 * sq(x) @ sq(V_abs).T @ sq(B_abs)
        + (u**2 + scaled**2) * sq(h) @ sq(B_abs)
        + u**2 * outputs
        + of_x**2 * sq(x) @ sq(model.weight()).T
    )
    y_magnitude = np.abs(x) @ R_abs.T + h_abs @ B_abs + np.abs(b)

    q = g @ (U * model.o).T  # (T, r): ds = Σ_t h q
    P = h.T @ g
    VUs = V.T @ (U * model.s[:, None])  # (n, m): do = Σ_t g (x V U s)
    ds_variance = (
        u**2 * (sq(h) * sq(q)).sum(0)
        + stored**2 * (sq(V_abs) * sq(q.T @ x)).sum(1)
        + (u + 5 * V32) ** 2 * (sq(P) * sq(U_o)).sum(1)
        + of_x**2 * (sq(x) @ sq(V).T * sq(q)).sum(0)
    )
    do_variance = (
        u**2 * (sq(h).T @ sq(g) * sq(U_s)).sum(0)
        + stored**2 * (sq(U_s) * (sq(V_abs) @ sq(x.T @ g))).sum(0)
        + (u + 5 * V32) ** 2 * (sq(P) * sq(U_s)).sum(0)
        + of_x**2 * (sq(x) @ sq(VUs) * sq(g)).sum(0)
    )
    P_magnitude = h_abs.T @ np.abs(g)

    dh, gR = g @ B.T, g @ R
    dx_variance = (
        stored**2 * sq(g) @ sq(R_abs)
        + scaled**2 * sq(g) @ sq(B_abs).T @ sq(V_abs)
        + (u**2 + stored**2) * sq(dh) @ sq(V_abs)
        + u**2 * (sq(gR) + sq(dh @ V) + sq(dx))
    )
    dx_magnitude = np.abs(g) @ R_abs + np.abs(g) @ B_abs.T @ V_abs
    return Expected(
        y,
        dx * c,
        ds,
        do,
        total(y_variance, terms, y_magnitude),
        total(c**2 * dx_variance + of_x**2 * sq(c * dx), terms, c * dx_magnitude),
        total(ds_variance, terms, (P_magnitude * U_o).sum(1)),
        total(do_variance, terms, (P_magnitude * U_s).sum(0)),
    )


def assert_within(got: Tensor, expected: np.ndarray, tolerance: np.ndarray, name: str) -> None:
    error = np.abs(array(got).reshape(expected.shape) - expected)
    excess = error / tolerance
    assert (excess <= 1).all(), f"{name}: {excess.max():.2f} times the tolerance, error {error.max():.3g}"


def check(layer: QosoraLinear, rows: int, dtype: torch.dtype, seed: int, autocast: bool = False) -> None:
    """Training path, inference path and gradients against the reference. `dtype` is that of the products."""
    device = layer.s.device.type
    input_dtype = torch.float32 if autocast or layer.compute_dtype else dtype
    output_dtype = dtype if autocast else input_dtype
    # Representable in `dtype`, so that handing them over rounds nothing.
    x = draw(rows, layer.in_features, seed=seed, dtype=dtype).to(device, input_dtype).requires_grad_()
    g = draw(rows, layer.out_features, seed=seed + 1, dtype=dtype).to(device, output_dtype)
    s, o = vectors(layer)
    with torch.autocast(device, dtype, enabled=autocast):
        y = layer.apply_vectors(x, s, o)
        with torch.no_grad():
            fused = layer.apply_vectors(x, s, o)
    y.backward(g)

    e = expect(layer, x, g, dtype)
    assert y.dtype == fused.dtype == output_dtype
    assert (grad(x).dtype, grad(s).dtype, grad(o).dtype) == (input_dtype, torch.float32, torch.float32)
    assert_within(y, e.y, e.y_tolerance, "y")
    assert_within(fused, e.y, e.y_tolerance, "y, inference path")
    assert_within(grad(x), e.dx, e.dx_tolerance, "dx")
    assert_within(grad(s), e.ds, e.ds_tolerance, "ds")
    assert_within(grad(o), e.do, e.do_tolerance, "do")

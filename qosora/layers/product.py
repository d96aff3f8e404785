"""The product of a decomposed layer, y = R x + o ⊙ (U (s ⊙ (Vᵀ x))) + b, and its gradients; eager and compiled.

Backward. With h = V̂ᵀx (T×r) saved and x dropped, one r×m product serves both vectors:

    P = hᵀG                      G = dL/dy (T×m)
    dL/ds = rowsum(P ⊙ Uᵀ ⊙ o)   dL/do = colsum(P ⊙ Uᵀ ⊙ s)
    dL/dx = G R + (G Bᵀ) Vᵀ      B = Uᵀ ⊙ o ⊙ s (r×m)

So no T×m intermediate is built, and the layer's input need not be kept: LoRA must keep it for the gradient of A.

Precision. B is scaled in float32 and rounded to the compute dtype once. Rounding s or o themselves to bfloat16 would
lose every change of them below 2⁻⁸ of their size, and a small learning rate would train nothing. So is x, where the
layer has a scale: c ⊙ x is multiplied in float32, and so is the gradient on its way back.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qosora.decompose import Factors, parts
from qosora.layers import ops
from qosora.layers.device import device_type

__all__ = ["no_autocast", "osora_product", "product_float32", "scaled"]


def scaled(x: torch.Tensor, c: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return c ⊙ x in a dtype, rounded once; differentiable in x, which is not saved.

    Args:
        x: (T, n), float32, float16 or bfloat16.
        c: (n,), float32.
        dtype: Of the result.
    """
    if torch.compiler.is_compiling():  # which makes one kernel of it
        return (x * c).to(dtype)
    y: torch.Tensor = _Scaled.apply(x, c, dtype)  # type: ignore[no-untyped-call]
    return y


class _Scaled(torch.autograd.Function):
    """c ⊙ x, without copies of x in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(c)
        ctx.dtype = x.dtype
        return torch.mul(x, c, out=x.new_empty(x.shape, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (c,) = ctx.saved_tensors
        return torch.mul(g, c, out=g.new_empty(g.shape, dtype=ctx.dtype)), None, None


def osora_product(
    x: torch.Tensor,
    s: torch.Tensor,
    o: torch.Tensor,
    factors: Factors,
    bias: torch.Tensor | None = None,
    *,
    saves_first: bool = False,
) -> torch.Tensor:
    """Return R x + o ⊙ (U (s ⊙ Vᵀ x)) + b, (T, m), differentiable in x, s and o.

    Args:
        x: (T, n), float32, float16 or bfloat16, as is the result; with a scale, what `scaled` returns.
        s: (r,), float32.
        o: (m,), float32.
        factors: R, U and V.
        bias: (m,), of the dtype of x.
        saves_first: Whether to save what backward needs before R x is computed. Where this product is the last of a
            checkpointed layer, that ends there when it computes the layer again, and R x is not computed for nothing;
            elsewhere it costs another call of autograd.
    """
    if torch.compiler.is_compiling():
        y: torch.Tensor = _product_op(x, s, o, bias, *_stored(factors))[0]
    elif saves_first and (s.requires_grad or o.requires_grad):
        call = _Call(factors)
        handle, h = _Projection.apply(call, x, s, o)  # type: ignore[no-untyped-call]
        y = _Value.apply(handle, call, x.detach(), h, s.detach(), o.detach(), bias)  # type: ignore[no-untyped-call]
    else:
        y = _OsoraFunction.apply(x, s, o, factors, bias)  # type: ignore[no-untyped-call]
    return y


def _product(
    x: torch.Tensor,  # (T, n), compute dtype
    s: torch.Tensor,  # (r,), float32
    o: torch.Tensor,  # (m,), float32
    factors: Factors,
    bias: torch.Tensor | None,  # (m,), compute dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y = x Rᵀ + (x V ⊙ s) Uᵀ ⊙ o + b, (T, m), and h = x V, (T, r)."""
    h = _projection(x, factors)
    return _value(x, h, s, o, factors, bias), h


def _projection(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Return h = x V, (T, r)."""
    return x @ ops.dequantize(factors.V, x.dtype).T


def _value(
    x: torch.Tensor, h: torch.Tensor, s: torch.Tensor, o: torch.Tensor, factors: Factors, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return y, (T, m), given h."""
    y = F.linear(x, ops.dequantize(factors.residual, x.dtype), bias)
    ops.add_low_rank_(y, h, factors.U, s, o)
    return y


def _gradients(
    g: torch.Tensor,  # (T, m), compute dtype
    h: torch.Tensor | None,  # (T, r), or None if neither s nor o is trained
    s: torch.Tensor,
    o: torch.Tensor,
    factors: Factors,
    of_x: bool,
) -> list[torch.Tensor]:
    """Return those of dL/ds (r,) and dL/do (m,), and of dL/dx (T, n), that are wanted."""
    found: list[torch.Tensor] = []
    with no_autocast(g.device.type):
        if h is None:
            B = ops.scaled_U(factors.U, s, o, g.dtype)
        elif of_x:
            *found, B = ops.gradients_and_scaled_U(product_float32(h.T, g), factors.U, s, o, g.dtype)
        else:
            found += ops.vector_gradients(product_float32(h.T, g), factors.U, s, o)
        if of_x:
            dh = g @ B.T
            del B
            dx = g @ ops.dequantize(factors.residual, g.dtype)
            found.append(dx.addmm_(dh, ops.dequantize(factors.V, g.dtype)))
    return found


def _of_x_s_o(found: list[torch.Tensor], of_x: bool) -> tuple[torch.Tensor | None, ...]:
    """Return what `_gradients` found in the order of x, s, o; None for those that it was not asked for."""
    dx = found.pop() if of_x else None
    ds, do = found or (None, None)
    return dx, ds, do


class _OsoraFunction(torch.autograd.Function):
    """`_product`, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, s: torch.Tensor, o: torch.Tensor, factors: Factors, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y, h = _product(x, s, o, factors, bias)
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(h if trained else None, s, o)
        ctx.factors = factors
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, s, o = ctx.saved_tensors
        of_x = ctx.needs_input_grad[0]
        return *_of_x_s_o(_gradients(g, h, s, o, ctx.factors, of_x), of_x), None, None


class _Call:
    """One product in two steps: its factors, and dL/dy on its way from the second step to the first."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.g: torch.Tensor | None = None


class _Projection(torch.autograd.Function):
    """The first step: computes h, saves it, and in backward computes all gradients. Also gives an empty handle."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: torch.Tensor, s: torch.Tensor, o: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = _projection(x, call.factors)
        ctx.save_for_backward(h, s, o)
        ctx.call = call
        ctx.mark_non_differentiable(h)
        return x.new_empty(0), h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        h, s, o = ctx.saved_tensors
        g, ctx.call.g = ctx.call.g, None
        of_x = ctx.needs_input_grad[1]
        return None, *_of_x_s_o(_gradients(g, h, s, o, ctx.call.factors, of_x), of_x)


class _Value(torch.autograd.Function):
    """The second step: y. Its gradient goes to the first past autograd, which wants it in the shape of the handle."""

    @staticmethod
    def forward(
        ctx: Any,
        handle: torch.Tensor,
        call: _Call,
        x: torch.Tensor,
        h: torch.Tensor,
        s: torch.Tensor,
        o: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.call = call
        return _value(x, h, s, o, call.factors, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.call.g = g
        return g.new_empty(0), None, None, None, None, None, None


# The same for torch.compile, as operators that it does not look into: what it sees inside, it would share between
# forward and backward and so keep every layer's weight, dequantized, from the one to the other.

_STORED = "Tensor[] stored, str quant_type, int blocksize"


@torch.library.custom_op(
    "qosora::product",
    mutates_args=(),
    schema=f"(Tensor x, Tensor s, Tensor o, Tensor? bias, {_STORED}) -> (Tensor, Tensor)",
)
def _product_op(
    x: torch.Tensor,
    s: torch.Tensor,
    o: torch.Tensor,
    bias: torch.Tensor | None,
    stored: list[torch.Tensor],
    quant_type: str,
    blocksize: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _product(x, s, o, _factors(stored, x.shape[1], s, o, quant_type, blocksize), bias)


@_product_op.register_fake
def _(x: torch.Tensor, s: torch.Tensor, o: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], o.shape[0]), x.new_empty(x.shape[0], s.shape[0])


@torch.library.custom_op(
    "qosora::gradients",
    mutates_args=(),
    schema=f"(Tensor g, Tensor? h, Tensor s, Tensor o, bool of_x, int in_features, {_STORED}) -> Tensor[]",
)
def _gradients_op(
    g: torch.Tensor,
    h: torch.Tensor | None,
    s: torch.Tensor,
    o: torch.Tensor,
    of_x: bool,
    in_features: int,
    stored: list[torch.Tensor],
    quant_type: str,
    blocksize: int,
) -> list[torch.Tensor]:
    return _gradients(g, h, s, o, _factors(stored, in_features, s, o, quant_type, blocksize), of_x)


@_gradients_op.register_fake
def _(
    g: torch.Tensor,
    h: torch.Tensor | None,
    s: torch.Tensor,
    o: torch.Tensor,
    of_x: bool,
    in_features: int,
    *_: Any,
) -> list[torch.Tensor]:
    vectors = [] if h is None else [torch.empty_like(s), torch.empty_like(o)]
    return vectors + [g.new_empty(g.shape[0], in_features)] * of_x


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, s, o, _, stored, *ctx.storage = inputs
    trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(output[1] if trained else None, s, o, *stored)
    ctx.in_features = x.shape[1]


def _go_back(ctx: Any, g: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    h, s, o, *stored = ctx.saved_tensors
    of_x = ctx.needs_input_grad[0]
    found = _gradients_op(g.contiguous(), h, s, o, of_x, ctx.in_features, stored, *ctx.storage)
    return *_of_x_s_o(found, of_x), None, [None] * len(stored), None, None


_product_op.register_autograd(_go_back, setup_context=_keep)


def _factors(
    stored: list[torch.Tensor], in_features: int, s: torch.Tensor, o: torch.Tensor, quant_type: str, blocksize: int
) -> Factors:
    """Return the decomposition that `_stored` takes apart."""
    doubled = len(stored) > 2 * len(parts.PARTS)  # with double quantization
    names = [name for part in parts.PARTS for name in parts.stored_names(part, doubled)]
    shapes = parts.shapes(len(o), in_features, len(s))
    return parts.factors(dict(zip(names, stored, strict=True)), shapes, s, quant_type, blocksize)


def _stored(factors: Factors) -> tuple[list[torch.Tensor], str, int]:
    """Return a decomposition as the operators take it."""
    return list(parts.tensors(factors).values()), factors.residual.quant_type, factors.residual.blocksize


def no_autocast(device: str) -> AbstractContextManager[None]:
    """For a backward that is called under autocast, which would round the products with s and o to 16 bits."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def product_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply in float32, a @ b from operands of 16 bits, without float32 copies of them."""
    if a.dtype == torch.float32:
        return a @ b
    if device_type(a) == "cuda" and torch.version.hip is None:  # ROCm does not take an out_dtype
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a.contiguous() @ b).float()  # CPU products accumulate in float32, too, but come out rounded

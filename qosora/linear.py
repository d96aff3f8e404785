"""`QosoraLinear`: a linear layer whose weight is decomposed and frozen in 4 bits, steered by two float32 vectors.

    y = R x + o ⊙ (U (s ⊙ (Vᵀ x))) + b          (OSoRA, arXiv 2505.14350, with R, U, V in 4 bits)

R: (m, n), U: (m, r), V: (n, r) are frozen; s: (r,) starts at the singular values and o: (m,) at ones. The layer holds
one frozen pair (s, o) of its own, the base's; an adapter trains a copy and hands it to `apply_vectors`.

Backward. With h = V̂ᵀx (T×r) saved and x dropped, one r×m product serves both vectors:

    P = hᵀG                      G = dL/dy (T×m)
    dL/ds = rowsum(P ⊙ Uᵀ ⊙ o)   dL/do = colsum(P ⊙ Uᵀ ⊙ s)
    dL/dx = G R + (G Bᵀ) Vᵀ      B = Uᵀ ⊙ o ⊙ s (r×m)

So no T×m intermediate is built, and the layer's input need not be kept: LoRA must keep it for the gradient of A.

Precision. B is scaled in float32 and rounded to the compute dtype once. Rounding s or o themselves to bfloat16 would
lose every change of them below 2⁻⁸ of their size, and a small learning rate would train nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qosora import kernels, nf4
from qosora.errors import QosoraError
from qosora.factorize import Factors, reconstruct
from qosora.nf4 import FourBitTensor

__all__ = ["QosoraLinear", "float32_kept", "qosora_modules"]

#: Prefix of a stored 4-bit tensor's parameters in the module. The packed residual is called `weight`, so that a loader
#: that knows nothing of qosora stops at its shape instead of initialising a weight at random.
_PREFIXES = {"residual": "weight", "U": "U", "V": "V"}


class QosoraLinear(nn.Module):
    """A frozen, decomposed linear layer.

    Parameters, all frozen: `weight`, `weight_absmax`, `weight_absmax_scale`, `weight_absmax_offset` (R), the same
    with `U` (Uᵀ, (rank, out_features)) and `V` (Vᵀ, (rank, in_features)), as laid out in `qosora.nf4`; `s` (rank,)
    and `o` (out_features,), float32; `bias` (out_features,).

    Args:
        in_features: n.
        out_features: m.
        bias: Whether there is one.
        rank: r; at most min(m, n) is used.
        quant_type: "nf4" or "fp4".
        blocksize: Values per quantization block.
        double_quant: Whether absmax values are quantized, too.
        compute_dtype: Dtype of the products outside autocast; by default that of the input.
        fan_in_fan_out: Whether the layer was made of a `Conv1D` (GPT-2), whose checkpoints hold the transpose.
        device: Where to allocate the parameters, which are uninitialised.
        dtype: Of the bias.
    """

    s: nn.Parameter
    o: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        fan_in_fan_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank = min(rank, in_features, out_features)
        self.quant_type, self.blocksize, self.double_quant = quant_type, blocksize, double_quant
        self.compute_dtype = compute_dtype
        self.fan_in_fan_out = fan_in_fan_out
        for part, prefix in _PREFIXES.items():
            numel = self._shape(part)[0] * self._shape(part)[1]
            for field, (shape, kind) in nf4.stored_shapes(numel, blocksize, double_quant).items():
                name = prefix if field == "packed" else f"{prefix}_{field}"
                self._add(name, torch.empty(shape, dtype=kind, device=device))
        self._add("s", torch.empty(self.rank, dtype=torch.float32, device=device))
        self._add("o", torch.empty(out_features, dtype=torch.float32, device=device))
        self._add("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def _add(self, name: str, tensor: torch.Tensor | None) -> None:
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def _shape(self, part: str) -> tuple[int, int]:
        return {
            "residual": (self.out_features, self.in_features),
            "U": (self.rank, self.out_features),
            "V": (self.rank, self.in_features),
        }[part]

    def _four_bit(self, part: str) -> FourBitTensor:
        prefix, params = _PREFIXES[part], self._parameters
        return FourBitTensor(
            params[prefix],  # type: ignore[arg-type]
            params[f"{prefix}_absmax"],  # type: ignore[arg-type]
            params.get(f"{prefix}_absmax_scale"),
            params.get(f"{prefix}_absmax_offset"),
            self._shape(part),
            self.quant_type,
            self.blocksize,
        )

    @property
    def factors(self) -> Factors:
        """The decomposition, as views of the parameters; its σ is the layer's `s`."""
        return Factors(self._four_bit("residual"), self._four_bit("U"), self._four_bit("V"), self.s)

    @staticmethod
    def state_of(factors: Factors) -> dict[str, torch.Tensor]:
        """Return the parameters that hold a decomposition, by name: all but the bias."""
        state = {}
        for part, prefix in _PREFIXES.items():
            for field, tensor in getattr(factors, part).tensors().items():
                state[prefix if field == "packed" else f"{prefix}_{field}"] = tensor
        ones = torch.ones(factors.U.shape[1], dtype=torch.float32, device=factors.sigma.device)
        return {**state, "s": factors.sigma, "o": ones}

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Copy a decomposition of the layer's shape into the parameters, with o = 1."""
        for name, tensor in self.state_of(factors).items():
            self.get_parameter(name).copy_(tensor)

    def dequantize(self, s: torch.Tensor | None = None, o: torch.Tensor | None = None) -> torch.Tensor:
        """Return R + diag(o) U diag(s) Vᵀ, (out_features, in_features), float32; by default with the base's s and o."""
        with torch.no_grad():
            return reconstruct(self.factors, s, self.o if o is None else o)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the base's output. x: (..., in_features)."""
        return self.apply_vectors(x, self.s, self.o)

    def apply_vectors(self, x: torch.Tensor, s: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """Return R x + o ⊙ U (s ⊙ Vᵀ x) + b, differentiable in x, s and o.

        Products are in the autocast dtype where autocast is on, else in `compute_dtype`, else in the input's; the
        result is in the autocast dtype or the input's, as with `nn.Linear`.

        Args:
            x: (..., in_features).
            s: (rank,), float32.
            o: (out_features,), float32.
        """
        if self.weight.is_meta and not x.is_meta:
            raise QosoraError("the base's weights are not in memory: load it whole on one device, not offloaded")
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            out_dtype = dtype = torch.get_autocast_dtype(device)
        else:
            out_dtype, dtype = x.dtype, self.compute_dtype or x.dtype
        rows = x.reshape(-1, self.in_features).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        factors = self.factors
        if torch.is_grad_enabled() and (x.requires_grad or s.requires_grad or o.requires_grad):
            if torch.compiler.is_compiling():
                y, _ = _product_op(rows, s, o, bias, _stored(factors), self.quant_type, self.blocksize)
            else:
                y = _OsoraFunction.apply(rows, s, o, factors, bias)  # type: ignore[no-untyped-call]
        else:
            h = nf4.matmul(rows, factors.V)
            y = nf4.matmul(rows, factors.residual)
            kernels.add_low_rank_(y, h, factors.U, s, o, bias)
        return y.to(out_dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QosoraLinear:
        """Move or cast, but keep float32 statistics and vectors float32: `model.to(torch.bfloat16)` is common."""
        with float32_kept(self, [name for name in self._parameters if name != "bias"]):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _replicate_for_data_parallel(self) -> QosoraLinear:
        """Refuse `nn.DataParallel`, in which Trainer wraps a model by itself where it sees several GPUs."""
        raise QosoraError(
            "nn.DataParallel would copy the whole base to every GPU at every step, so qosora does not run in it. Show "
            "the program one GPU: CUDA_VISIBLE_DEVICES=0"
        )

    def extra_repr(self) -> str:
        """Name the layer's shape and storage, as `nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, quant_type={self.quant_type}, blocksize={self.blocksize}"
        )


def _product(
    x: torch.Tensor,  # (T, n), compute dtype
    s: torch.Tensor,  # (r,), float32
    o: torch.Tensor,  # (m,), float32
    factors: Factors,
    bias: torch.Tensor | None,  # (m,), compute dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y = x Rᵀ + (x V ⊙ s) Uᵀ ⊙ o + b, (T, m), and h = x V, (T, r)."""
    y = F.linear(x, kernels.dequantize(factors.residual, x.dtype), bias)
    h = x @ kernels.dequantize(factors.V, x.dtype).T
    kernels.add_low_rank_(y, h, factors.U, s, o)
    return y, h


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
    with _no_autocast(g.device.type):
        if h is not None:
            found += kernels.vector_gradients(_product_float32(h.T, g), factors.U, s, o)
        if of_x:
            dx = g @ kernels.dequantize(factors.residual, g.dtype)
            dh = g @ kernels.scaled_U(factors.U, s, o, g.dtype).T
            found.append(dx.addmm_(dh, kernels.dequantize(factors.V, g.dtype)))
    return found


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
        found = _gradients(g, h, s, o, ctx.factors, ctx.needs_input_grad[0])
        dx = found.pop() if ctx.needs_input_grad[0] else None
        ds, do = found or (None, None)
        return dx, ds, do, None, None


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
    factors = _factors(stored, x.shape[1], s, o, quant_type, blocksize)
    return _product(x, s, o, factors, bias)


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
    dx = found.pop() if of_x else None
    ds, do = found or (None, None)
    return dx, ds, do, None, [None] * len(stored), None, None


_product_op.register_autograd(_go_back, setup_context=_keep)


def _factors(
    stored: list[torch.Tensor], in_features: int, s: torch.Tensor, o: torch.Tensor, quant_type: str, blocksize: int
) -> Factors:
    """Return the decomposition of the tensors that `_stored` lists."""
    shapes = {"residual": (len(o), in_features), "U": (len(s), len(o)), "V": (len(s), in_features)}
    fields = iter(stored)
    doubled = len(stored) > 2 * len(shapes)  # with double quantization
    parts = {}
    for part, shape in shapes.items():
        packed, absmax = next(fields), next(fields)
        scale, offset = (next(fields), next(fields)) if doubled else (None, None)
        parts[part] = FourBitTensor(packed, absmax, scale, offset, shape, quant_type, blocksize)
    return Factors(**parts, sigma=s)


def _stored(factors: Factors) -> list[torch.Tensor]:
    return [t for part in (factors.residual, factors.U, factors.V) for t in part.tensors().values()]


def _no_autocast(device: str) -> AbstractContextManager[None]:
    """For a backward that is called under autocast, which would round the products with s and o to 16 bits."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _product_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply in float32, a @ b from operands of 16 bits, without float32 copies of them."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a.contiguous() @ b).float()  # CPU products accumulate in float32, too, but come out rounded


@contextmanager
def float32_kept(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Undo, on exit, any change of dtype that was made to a module's own float32 parameters; keep changes of device.

    A parameter that stays on its device stays the same object, which an optimizer may hold, and keeps its gradient.
    """
    params = {name: p for name in names if (p := module._parameters[name]) is not None and p.dtype == torch.float32}
    kept = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in params.items()}
    yield
    for name, (data, grad) in kept.items():
        param = module._parameters[name]
        assert param is not None
        if param.dtype != torch.float32:
            device = param.device
            param.data = torch.empty_like(data, device=device) if data.is_meta else data.to(device)
            param.grad = None if grad is None else grad.to(device)


def qosora_modules(model: nn.Module) -> dict[str, QosoraLinear]:
    """Return the decomposed layers of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QosoraLinear)}

"""`QosoraLinear`: a linear layer whose weight is decomposed and frozen in 4 bits, steered by two float32 vectors.

    y = R x + o ⊙ (U (s ⊙ (Vᵀ x))) + b          (OSoRA, arXiv 2505.14350, with R, U, V in 4 bits)

R: (m, n), U: (m, r), V: (n, r) are frozen; s: (r,) starts at the singular values and o: (m,) at ones. The layer holds
one frozen pair (s, o) of its own, the base's; an adapter trains a copy and hands it to `apply_vectors`.

With a scale (`decompose.scales`), x is c ⊙ (the layer's input), c: (n,) frozen, too.

Products and gradients are in `qosora.layers.product`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qosora.compat.torch import own_parameters
from qosora.decompose import Factors, nf4, parts, reconstruct
from qosora.errors import QosoraError
from qosora.layers import ops
from qosora.layers.device import autocast_dtype
from qosora.layers.kept import KEPT_ROWS, Kept
from qosora.layers.product import osora_product, scaled

__all__ = ["Member", "QosoraLinear", "float32_kept", "qosora_modules", "updated"]


class QosoraLinear(nn.Module):
    """A frozen, decomposed linear layer.

    Parameters, all frozen: R, U and V as `decompose.parts` names them; `s` (rank,), `o` (out_features,) and `c`
    (in_features,) or None, float32; `bias` (out_features,).

    Args:
        in_features: n.
        out_features: m.
        bias: Whether there is one.
        rank: r; at most min(m, n) is used.
        quant_type: "nf4" or "fp4".
        blocksize: Values per quantization block.
        double_quant: Whether absmax values are quantized, too.
        has_scale: Whether inputs are multiplied by a `c`.
        compute_dtype: Dtype of the products outside autocast; by default that of the input.
        fan_in_fan_out: Whether the layer was made of a `Conv1D` (GPT-2), whose checkpoints hold the transpose.
        device: Where to allocate the parameters, which are uninitialised.
        dtype: Of the bias.
    """

    s: nn.Parameter
    o: nn.Parameter
    c: nn.Parameter | None
    bias: nn.Parameter | None
    #: Options of `factorize` that are the layer's own, whatever the base's.
    factorize_options: ClassVar[dict[str, Any]] = {}

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
        has_scale: bool = False,
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
        #: Whether this is the last product of a layer that is checkpointed; see `osora_product`.
        self.saves_first = False
        self._kept: Kept | None = None
        stored = parts.stored_shapes(out_features, in_features, self.rank, blocksize, double_quant)
        for name, (shape, kind) in stored.items():
            self._add(name, torch.empty(shape, dtype=kind, device=device))
        self._add("s", torch.empty(self.rank, dtype=torch.float32, device=device))
        self._add("o", torch.empty(out_features, dtype=torch.float32, device=device))
        self._add("c", torch.empty(in_features, dtype=torch.float32, device=device) if has_scale else None)
        self._add("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def _add(self, name: str, tensor: torch.Tensor | None) -> None:
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def factors(self) -> Factors:
        """The decomposition, as views of the parameters; its σ is the layer's `s`."""
        shapes = parts.shapes(self.out_features, self.in_features, self.rank)
        return parts.factors(self._parameters, shapes, self.s, self.quant_type, self.blocksize)

    def state_of(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Return the parameters that hold a decomposition, by name: all but the bias."""
        ones = torch.ones(factors.U.shape[1], dtype=torch.float32, device=factors.sigma.device)
        c = {} if factors.scale is None else {"c": factors.scale}
        return {**parts.tensors(factors), "s": factors.sigma, "o": ones, **c}

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Copy a decomposition of the layer's shape into the parameters, with o = 1."""
        for name, tensor in self.state_of(factors).items():
            self.get_parameter(name).copy_(tensor)

    def dequantize(self, s: torch.Tensor | None = None, o: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight, (out_features, in_features), float32; by default with the base's s and o."""
        with torch.no_grad():
            return reconstruct(self.factors, s, self.o if o is None else o)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the base's output. x: (..., in_features)."""
        return self.apply_vectors(x, self.s, self.o)

    def apply_vectors(self, x: torch.Tensor, s: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """Return R x + o ⊙ U (s ⊙ Vᵀ x) + b, of c ⊙ x in place of x where there is a c, differentiable in x, s and o.

        Products are in the autocast dtype where autocast is on, else in `compute_dtype`, else in the input's; the
        result is in the autocast dtype or the input's, as with `nn.Linear`.

        Args:
            x: (..., in_features).
            s: (rank,), float32.
            o: (out_features,), float32.
        """
        self.require_weights(x)
        autocast = autocast_dtype(x)
        out_dtype, dtype = autocast or x.dtype, autocast or self.compute_dtype or x.dtype
        rows = x.reshape(-1, self.in_features)
        rows = rows.to(dtype) if self.c is None else scaled(rows, self.c, dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        factors = self.factors
        if torch.is_grad_enabled() and (x.requires_grad or s.requires_grad or o.requires_grad):
            y = osora_product(rows, s, o, factors, bias, saves_first=self.saves_first)
        elif (kept := self._kept_for(rows, s, o, factors)) is not None:
            y = kept.product(rows, factors.residual, bias)
        else:
            h = nf4.matmul(rows, factors.V)
            y = nf4.matmul(rows, factors.residual)
            ops.add_low_rank_(y, h, factors.U, s, o, bias)
        return y.to(out_dtype).view(*x.shape[:-1], self.out_features)

    def member(self) -> Member:
        """Return what the layer multiplies by."""
        return Member(self, self.s, self.o)

    def require_weights(self, x: torch.Tensor) -> None:
        """Refuse to multiply by weights that are not there."""
        if self.weight.is_meta and not x.is_meta:
            raise QosoraError("the base's weights are not in memory: load it whole on one device, not offloaded")

    def _kept_for(self, x: torch.Tensor, s: torch.Tensor, o: torch.Tensor, factors: Factors) -> Kept | None:
        """Return the matrices to generate with, made anew where the vectors have changed; None where none are kept."""
        few = x.device.type == "cpu" and 0 < len(x) <= KEPT_ROWS
        if self.training or not few or torch.compiler.is_compiling():
            return None
        if self._kept is None or not self._kept.is_for(s, o, x.dtype):
            self._kept = None  # first, for its memory
            self._kept = Kept(factors, s, o, x.dtype) if Kept.affordable(factors, x.dtype) else None
        return self._kept

    def train(self, mode: bool = True) -> QosoraLinear:
        """Set the mode, as of any module; what is kept for generation is dropped in training."""
        self._kept = None if mode else self._kept
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QosoraLinear:
        """Move or cast, but keep float32 statistics and vectors float32: `model.to(torch.bfloat16)` is common."""
        self._kept = None
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


class Member(NamedTuple):
    """What a layer multiplies by, where several are computed together; see `grouped`.

    Attributes:
        layer: With what is frozen.
        s: (r,), float32.
        o: (m,), float32.
        update: B (m, k) and A (k, n) of an adapter that has them, float32.
    """

    layer: QosoraLinear
    s: torch.Tensor
    o: torch.Tensor
    update: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def alike(self) -> tuple[Any, ...]:
        """What layers that are computed together have in common."""
        at, ranks = self.layer, None if self.update is None else self.update[1].shape
        stored = (at.in_features, at.out_features, at.rank, at.quant_type, at.blocksize, at.double_quant)
        return (type(at), *stored, at.bias is None, at.c is None, at.compute_dtype, at.weight.device, ranks)


def updated(x: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Return an update's part of an output, B A x, (..., m), in the dtype of x, (..., n); B and A: float32."""
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


@contextmanager
def float32_kept(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Undo, on exit, any change of dtype that was made to a module's own float32 parameters; keep changes of device.

    A parameter that stays on its device stays the same object, which an optimizer may hold, and keeps its gradient.
    """
    own = own_parameters(module)
    params = {name: p for name in names if (p := own[name]) is not None and p.dtype == torch.float32}
    kept = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in params.items()}
    yield
    for name, (data, grad) in kept.items():
        param = own[name]
        assert param is not None
        if param.dtype != torch.float32:
            device = param.device
            param.data = torch.empty_like(data, device=device) if data.is_meta else data.to(device)
            param.grad = None if grad is None else grad.to(device)


def qosora_modules(model: nn.Module) -> dict[str, QosoraLinear]:
    """Return the decomposed layers of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QosoraLinear)}

"""What a layer keeps while it generates on a CPU: matrices that it would otherwise decode anew for every token.

A step of generation multiplies one row by each weight. Decoding U, V and the residual for that takes many times as long
as the product. So B = diag(s) Uᵀ diag(o) and V are kept as matrices, and the residual as bitsandbytes' own layer, which
on a CPU with AVX512-BF16 repacks its weight at first use and then takes an eighth of the time (2048 x 2048: 0.17 ms in
place of 1.35). That takes the residual's bytes once more, and 2 (m + n) r for the matrices (Llama-2-7B at rank 128: 0.7
GB). On a GPU the fused kernels decode on the way, and nothing is kept.
"""

from __future__ import annotations

import psutil
import torch
from torch import nn

from qosora.compat.bitsandbytes import REPACKED_ROWS, linear4bit
from qosora.decompose import Factors, FourBitTensor, nf4
from qosora.layers import ops

__all__ = ["KEPT_ROWS", "Kept"]

#: More rows than this multiply by weights that are decoded for the occasion, which is little beside so many products.
KEPT_ROWS = 16
#: Bytes of memory to leave for all else; with less, nothing more is kept.
_SPARE_BYTES = 2**31


class Kept:
    """Matrices of a layer and the vectors that they were made with.

    Args:
        factors: Of the layer, on the CPU.
        s: (rank,), float32.
        o: (out_features,), float32.
        dtype: Of the products.
    """

    def __init__(self, factors: Factors, s: torch.Tensor, o: torch.Tensor, dtype: torch.dtype) -> None:
        self._s, self._o = s.detach().clone(), o.detach().clone()
        self._V, self._B = ops.dequantize(factors.V, dtype), ops.scaled_U(factors.U, s, o, dtype)
        self._residual = _residual_layer(factors.residual) if dtype == torch.bfloat16 else None
        self.dtype = dtype

    @staticmethod
    def affordable(factors: Factors, dtype: torch.dtype) -> bool:
        """Say whether there is memory for it."""
        numel = sum(part.shape[0] * part.shape[1] for part in (factors.U, factors.V))
        needed = factors.residual.nbytes + numel * dtype.itemsize
        return int(psutil.virtual_memory().available) > _SPARE_BYTES + needed

    def is_for(self, s: torch.Tensor, o: torch.Tensor, dtype: torch.dtype) -> bool:
        """Say whether it was made with these values: an optimizer writes new ones to the same memory."""
        return dtype == self.dtype and torch.equal(s, self._s) and torch.equal(o, self._o)

    def product(self, x: torch.Tensor, residual: FourBitTensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return R x + B (Vᵀ x) + b, (rows, out_features), for x (rows, in_features) without a graph."""
        y: torch.Tensor = nf4.matmul(x, residual) if self._residual is None else self._residual(x)
        y.addmm_(x @ self._V.T, self._B)
        return y if bias is None else y.add_(bias)


def _residual_layer(q: FourBitTensor) -> nn.Module | None:
    """Return bitsandbytes' layer of a weight, or None where it takes no other way than we do."""
    if q.shape[0] % REPACKED_ROWS or q.shape[1] % q.blocksize or q.absmax_scale is None:
        return None
    return linear4bit(
        q.tensors(), q.shape, q.quant_type, q.blocksize,
        table=nf4.code_table(q.quant_type, q.packed.device), absmax_code=nf4.absmax_code(q.packed.device),
    )  # fmt: skip

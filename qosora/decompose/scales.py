"""What to multiply a layer's inputs by, so that the weight that is left is quantized with less harm.

    W x = (W diag(1/c)) (c ⊙ x)          c: (n,)

Blocks of a row of W diag(1/c) are quantized with an error in proportion to their largest entry, alike for all columns
of a block, and c multiplies it by c_j again. So E||ΔW x||², summed over columns, is in proportion to

    Σ_j c_j² E[x_j²] · mean_k ||W_k||² / c_k²        which is least at        c_j² = ||W_j|| / sqrt(E[x_j²])

by Cauchy and Schwarz. "calibrated" takes that, with E[x²] measured on some text. "columns" takes c_j = ||W_j||, which
it becomes where columns are as small as the activations that they meet are large, as in trained models they nearly are:
all columns of W diag(1/c) then have one norm. It takes no data.

KL divergence of Gemma 3 270M's next tokens from the unquantized model's (`benchmarks/start.py`): a third less than
without a scale for "columns" at rank 32 to 128, half for "calibrated". Powers of two next to the c of "columns", which
would multiply without rounding, gain three quarters of that.
"""

from __future__ import annotations

import torch

from qosora.decompose.svd import PANEL
from qosora.decompose.threads import panels, parallel_map, reproducible
from qosora.errors import ConfigError

__all__ = ["SCALES", "column_scale"]

#: What a scale can be made from, beside None.
SCALES = ("columns", "calibrated")
#: c lies between 2^-LIMIT and 2^LIMIT, to leave float16 its range.
_LIMIT = 8


@reproducible
def column_scale(W: torch.Tensor, moments: torch.Tensor | None = None) -> torch.Tensor:
    """Return c over its geometric mean; channels where that is not known, of zeros, are left out of it and get 1.

    Args:
        W: (m, n), float32.
        moments: E[x²] of the layer's inputs, (n,), for "calibrated"; "columns" without.

    Returns:
        (n,), float32.

    Raises:
        ConfigError: If there are not as many moments as columns.
    """
    squares = parallel_map(lambda rows: W[rows].double().square().sum(0), panels(len(W), PANEL, W.device))
    exponents = torch.stack(squares).sum(0).log2() / 2
    if moments is not None:
        if moments.shape != exponents.shape:
            raise ConfigError(f"{tuple(moments.shape)} moments of the inputs of a weight with {W.shape[1]} columns")
        exponents = exponents / 2 - moments.to(exponents).log2() / 4
    known = exponents.isfinite()
    exponents = (exponents - exponents[known].mean()).clamp(-_LIMIT, _LIMIT)
    return torch.exp2(exponents.where(known, 0)).float()

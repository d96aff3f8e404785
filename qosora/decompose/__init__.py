"""A weight becomes 4-bit factors and a 4-bit residual.

| module | one line |
|---|---|
| `threads` | the same bits on any number of threads |
| `kinds` | which forms tensors are stored in |
| `svd` | truncated SVD, randomized or exact |
| `nf4` | 4-bit tensors |
| `int8` | matrices in 8 bits |
| `scales` | what inputs are multiplied by, to make a weight's columns alike |
| `factorize` | W = R + U diag(σ) Vᵀ, with R of what the 4-bit factors leave |
| `parts` | the tensors that these are stored as |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.decompose.factorize import ErrorReport as ErrorReport
    from qosora.decompose.factorize import Factors as Factors
    from qosora.decompose.factorize import factorize_with_report as factorize_with_report
    from qosora.decompose.factorize import measure_error as measure_error
    from qosora.decompose.factorize import reconstruct as reconstruct
    from qosora.decompose.kinds import BLOCKSIZES as BLOCKSIZES
    from qosora.decompose.kinds import EMBEDDINGS as EMBEDDINGS
    from qosora.decompose.kinds import QUANT_TYPES as QUANT_TYPES
    from qosora.decompose.nf4 import ABSMAX_BLOCKSIZE as ABSMAX_BLOCKSIZE
    from qosora.decompose.nf4 import FourBitTensor as FourBitTensor
    from qosora.decompose.nf4 import quantize as quantize
    from qosora.decompose.scales import SCALES as SCALES
    from qosora.decompose.svd import SVD_ITERATIONS as SVD_ITERATIONS
    from qosora.decompose.svd import SVD_METHODS as SVD_METHODS
    from qosora.decompose.svd import SVD_OVERSAMPLING as SVD_OVERSAMPLING
    from qosora.decompose.threads import reproducible as reproducible

__getattr__, __dir__ = door(
    __name__,
    {
        "threads": ["reproducible"],
        "svd": ["SVD_ITERATIONS", "SVD_METHODS", "SVD_OVERSAMPLING"],
        "kinds": ["BLOCKSIZES", "EMBEDDINGS", "QUANT_TYPES"],
        "nf4": ["ABSMAX_BLOCKSIZE", "FourBitTensor", "quantize"],
        "scales": ["SCALES"],
        "factorize": ["ErrorReport", "Factors", "factorize_with_report", "measure_error", "reconstruct"],
    },
)

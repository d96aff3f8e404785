"""Truncated singular value decomposition of a weight matrix, in float32.

    W ≈ U diag(σ) Vᵀ,   U: (m, r), σ: (r,) descending, V: (n, r), UᵀU = VᵀV = I

`exact` calls LAPACK/cuSOLVER and costs O(mn·min(m, n)). `randomized` is the subspace iteration of Halko, Martinsson
and Tropp (2011, arXiv 0909.4061, algorithms 4.4 and 5.1): a Gaussian sketch of `rank + oversampling` columns, power
iterations stabilised by a QR factorization after every product, and an exact SVD of the small projected matrix. It
costs 2(2q + 2)mn(r + p) floating-point operations for q iterations and p oversampling columns, all of them matrix
products.

The sketch is drawn on the CPU from a generator seeded for every call, so the result depends on the matrix, the
options and the device's arithmetic, and never on the order in which matrices are decomposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qosora.errors import ConfigError

__all__ = ["SVD", "exact_svd", "randomized_svd", "truncated_svd"]


class SVD(NamedTuple):
    """The leading singular triplets of a matrix, all float32.

    Attributes:
        U: (m, rank) left singular vectors in columns.
        sigma: (rank,) singular values, descending.
        V: (n, rank) right singular vectors in columns.
    """

    U: torch.Tensor
    sigma: torch.Tensor
    V: torch.Tensor


def truncated_svd(
    weight: torch.Tensor,
    rank: int,
    *,
    method: str = "randomized",
    iterations: int = 4,
    oversampling: int = 16,
    seed: int = 0,
) -> SVD:
    """Return the leading `rank` singular triplets of a matrix.

    Args:
        weight: (m, n), any floating-point dtype; decomposed in float32.
        rank: Number of triplets; more than min(m, n) gives min(m, n).
        method: "randomized" or "exact".
        iterations: Power iterations of the randomized method.
        oversampling: Extra columns of its sketch.
        seed: Seed of its sketch.

    Raises:
        ConfigError: If `method` is neither.
    """
    if method == "exact":
        return exact_svd(weight, rank)
    if method == "randomized":
        return randomized_svd(weight, rank, iterations=iterations, oversampling=oversampling, seed=seed)
    raise ConfigError(f"svd method must be 'randomized' or 'exact', got {method!r}")


def exact_svd(weight: torch.Tensor, rank: int) -> SVD:
    """Return the leading triplets from a full SVD. Arguments as in `truncated_svd`."""
    rank = min(rank, *weight.shape)
    U, sigma, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return SVD(U[:, :rank].contiguous(), sigma[:rank].contiguous(), Vh[:rank].T.contiguous())


def randomized_svd(
    weight: torch.Tensor, rank: int, *, iterations: int = 4, oversampling: int = 16, seed: int = 0
) -> SVD:
    """Return the leading triplets by randomized subspace iteration. Arguments as in `truncated_svd`."""
    W = weight.float()
    m, n = W.shape
    rank = min(rank, m, n)
    columns = min(rank + oversampling, m, n)
    if 2 * columns >= min(m, n):  # the sketch would be as large as the matrix: exact is as cheap, and exact
        return exact_svd(W, rank)

    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(n, columns, generator=generator).to(W.device)
    Q = _orthonormal(W @ sketch)
    for _ in range(iterations):
        Q = _orthonormal(W.T @ Q)
        Q = _orthonormal(W @ Q)
    # W ≈ Q QᵀW, and (QᵀW)ᵀ = P T with a small square T = X diag(σ) Yᵀ: the large factor never meets the SVD.
    P, T = torch.linalg.qr(W.T @ Q)
    X, sigma, Yh = torch.linalg.svd(T)
    U = Q @ Yh[:rank].T
    V = P @ X[:, :rank]
    return SVD(U, sigma[:rank].contiguous(), V)


def _orthonormal(Y: torch.Tensor) -> torch.Tensor:
    Q: torch.Tensor = torch.linalg.qr(Y)[0]
    return Q

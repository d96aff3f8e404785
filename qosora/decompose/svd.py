"""Truncated singular value decomposition of a weight matrix, in float32.

    W ≈ U diag(σ) Vᵀ,   U: (m, r), σ: (r,) descending, V: (n, r), UᵀU = VᵀV = I

`exact` calls LAPACK/cuSOLVER and costs O(mn·min(m, n)). `randomized` is the subspace iteration of Halko, Martinsson
and Tropp (2011, arXiv 0909.4061, algorithms 4.4 and 5.1): a Gaussian sketch of `rank + oversampling` columns, power
iterations stabilised by a QR factorization after every product, and an exact SVD of the small projected matrix. It
costs 2(2q + 2)mn(r + p) floating-point operations for q iterations and p oversampling columns, all of them matrix
products. The QR factorizations are matrix products, too, by way of the Cholesky factor of the Gram matrix (Yamamoto
et al. 2015, CholeskyQR2); Householder's takes over where the columns are nearly dependent.

The sketch is drawn on the CPU from a generator seeded for every call, so the result depends on the matrix, the
options and the device's arithmetic, and never on the order in which matrices are decomposed. On a CPU every step works
on panels cut by the shape alone, so the bits do not depend on the number of threads either (`threads`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qosora.decompose.threads import panels, parallel_map, reproducible
from qosora.errors import ConfigError

__all__ = [
    "SVD",
    "SVD_ITERATIONS",
    "SVD_METHODS",
    "SVD_OVERSAMPLING",
    "empty_matrix",
    "exact_svd",
    "randomized_svd",
    "truncated_svd",
]

SVD_METHODS = ("randomized", "exact")
#: Of the randomized method; `QosoraConfig` says what they bring.
SVD_ITERATIONS = 4
SVD_OVERSAMPLING = 16
#: Rows or columns of W, or rows of a basis, that one thread multiplies at a time.
PANEL = 256


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
    method: str = SVD_METHODS[0],
    iterations: int = SVD_ITERATIONS,
    oversampling: int = SVD_OVERSAMPLING,
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


def empty_matrix(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return an uninitialised float32 matrix, laid out for products with it and with its transpose."""
    m, n = shape
    # On a CPU, a row stride of a large power of two maps a column to a few sets of the cache: at n = 4096, products
    # with the transpose run at half their speed.
    padding = 16 if n % 64 == 0 and device.type == "cpu" else 0
    return torch.empty(m, n + padding, dtype=torch.float32, device=device)[:, :n]


@reproducible
def exact_svd(weight: torch.Tensor, rank: int) -> SVD:
    """Return the leading triplets from a full SVD. Arguments as in `truncated_svd`."""
    U, sigma, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return SVD(U[:, :rank].contiguous(), sigma[:rank].contiguous(), Vh[:rank].T.contiguous())


@reproducible
def randomized_svd(
    weight: torch.Tensor,
    rank: int,
    *,
    iterations: int = SVD_ITERATIONS,
    oversampling: int = SVD_OVERSAMPLING,
    seed: int = 0,
) -> SVD:
    """Return the leading triplets by randomized subspace iteration. Arguments as in `truncated_svd`."""
    m, n = weight.shape
    columns = min(rank + oversampling, m, n)
    if 2 * columns >= min(m, n):  # the sketch would be as large as the matrix: exact is as cheap, and exact
        return exact_svd(weight, rank)

    W = weight.float()
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(n, columns, generator=generator, dtype=torch.float32).to(W.device)
    Y = _times(W, sketch)
    for _ in range(iterations):
        # A basis that the next product only improves need not be orthonormal to the last digit.
        Z = _transposed_times(W, _qr(Y, passes=1)[0])
        Y = _times(W, _qr(Z, passes=1)[0])
    Q = _qr(Y)[0]
    # W ≈ Q QᵀW, and (QᵀW)ᵀ = P T with a small square T = X diag(σ) Yᵀ: the large factor never meets the SVD.
    P, T = _qr(_transposed_times(W, Q))
    X, sigma, Yh = torch.linalg.svd(T)
    U, V = _times(Q, Yh[:rank].T.float()), _times(P, X[:, :rank].float())
    return SVD(U, sigma[:rank].float(), V)


def _times(A: torch.Tensor, B: torch.Tensor, by_columns: bool = False) -> torch.Tensor:
    """A @ B, stored by rows or by columns, from panels of A's rows."""
    out = A.new_empty(B.shape[1], A.shape[0]).T if by_columns else A.new_empty(A.shape[0], B.shape[1])
    parallel_map(lambda rows: torch.mm(A[rows], B, out=out[rows]), panels(A.shape[0], PANEL, A.device))
    return out


def _transposed_times(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Aᵀ @ B, stored by columns, from panels of A's columns; faster for B stored by columns."""
    out = A.new_empty(B.shape[1], A.shape[1])
    parallel_map(lambda columns: torch.mm(B.T, A[:, columns], out=out[:, columns]), panels(A.shape[1], PANEL, A.device))
    return out.T


def _qr(Y: torch.Tensor, passes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Q and R, QR = Y: (length, columns), float32, stored by columns where Y is by rows, and R in float64.

    The rounding errors of a pass grow with the squared condition of Y, its columns scaled to unit length. Up to 1e4,
    one pass makes Q orthonormal to about 0.01, and another one to float32's precision.
    """
    R = eye = torch.eye(Y.shape[1], dtype=torch.float64, device=Y.device)
    for step in range(passes):
        gram = _gram(Y)
        norms = gram.diagonal().sqrt()
        L, failed = torch.linalg.cholesky_ex(gram / norms / norms[:, None])  # Y diag(1 / norms) = Q Lᵀ
        inverse = torch.linalg.solve_triangular(L, eye, upper=False)
        if failed or not inverse.square().sum() < 1e4:  # nearly dependent columns, zeros, or sums out of range
            Q, T = torch.linalg.qr(Y)
            return Q, T.double() @ R
        last = step == passes - 1
        Y = _times(Y, (inverse.T / norms[:, None]).float(), by_columns=Y.is_contiguous() == last)
        R = L.T * norms @ R
    return Y, R


def _gram(Y: torch.Tensor) -> torch.Tensor:
    """YᵀY, the sum over panels in float64."""
    parts = parallel_map(lambda rows: Y[rows].T @ Y[rows], panels(Y.shape[0], PANEL, Y.device))
    return torch.stack(parts).sum(0, dtype=torch.float64)

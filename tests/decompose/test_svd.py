from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threads import with_threads
from torch import Tensor

from qosora.decompose import svd as svd_module
from qosora.decompose.svd import SVD, empty_matrix, exact_svd, randomized_svd, truncated_svd
from qosora.errors import ConfigError

U32 = 2.0**-24  # unit roundoff of float32


def decaying(m: int, n: int, decay: float, seed: int) -> Tensor:
    """A random (m, n) float64 matrix whose k-th singular value is decay^k."""
    generator = torch.Generator().manual_seed(seed)
    size = min(m, n)
    left = torch.linalg.qr(torch.randn(m, size, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64))[0]
    return left * decay ** torch.arange(size, dtype=torch.float64) @ right.T


def orthonormality_error(Q: Tensor) -> float:
    return float(torch.linalg.matrix_norm(Q.double().T @ Q.double() - torch.eye(Q.shape[1]), ord=2))


def approximation(svd: SVD) -> Tensor:
    return svd.U.double() * svd.sigma.double() @ svd.V.double().T


def check(svd: SVD, m: int, n: int, rank: int) -> None:
    """Shape, dtype, order and orthonormality: what holds of any SVD.

    Householder QR and bidiagonalization give factors within c·(m + n)·√columns·u of orthonormal, with a small constant
    c (Higham, Accuracy and Stability, 19.4); the factors of `randomized_svd` are products of two such.
    """
    rank = min(rank, m, n)
    assert svd.U.shape == (m, rank)
    assert svd.sigma.shape == (rank,)
    assert svd.V.shape == (n, rank)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in svd)
    assert (svd.sigma >= 0).all()
    assert (svd.sigma.diff() <= 0).all()
    bound = 2 * (m + n) * (rank + 16) ** 0.5 * U32
    assert orthonormality_error(svd.U) < bound
    assert orthonormality_error(svd.V) < bound


@given(
    m=st.integers(1, 130),
    n=st.integers(1, 130),
    rank=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    method=st.sampled_from(["exact", "randomized"]),
    oversampling=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_any_shape(m: int, n: int, rank: int, dtype: torch.dtype, method: str, oversampling: int, seed: int):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    svd = truncated_svd(weight, rank, method=method, oversampling=oversampling, seed=seed)
    check(svd, m, n, rank)


@given(m=st.integers(1, 80), n=st.integers(1, 80), seed=st.integers(0, 2**32))
def test_full_rank_gives_the_matrix_back(m: int, n: int, seed: int):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    svd = randomized_svd(weight, m + n)
    # Backward stability of the SVD: ||W - U diag(σ) Vᵀ|| ≤ c·max(m, n)·u·||W||₂ with a small constant c.
    difference = torch.linalg.matrix_norm(approximation(svd) - weight.double(), ord=2)
    assert difference <= 8 * max(m, n) * U32 * float(svd.sigma[0])


@pytest.mark.parametrize("shape", [(200, 150), (150, 200), (257, 131)])
@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_randomized_equals_exact_on_a_decaying_spectrum(shape: tuple[int, int], decay: float, seed: int):
    rank, oversampling, iterations = 12, 16, 2
    weight = decaying(*shape, decay, seed)
    exact = exact_svd(weight, rank)
    randomized = randomized_svd(weight, rank, oversampling=oversampling, iterations=iterations, seed=seed)
    check(randomized, *shape, rank)
    # Subspace iteration finds singular value k to a relative (σ_l / σ_k)^(4q + 2), l = rank + oversampling, times a
    # factor of the sketch that is below 100 but for odds of about 1 in 10⁴; float32 adds (m + n) u.
    limit = 100 * decay ** ((oversampling + 1) * (4 * iterations + 2)) + sum(shape) * U32
    assert float((exact.sigma - randomized.sigma).abs().max()) < limit
    # The same approximation of W, although single vectors may differ in sign.
    residual, best = (torch.linalg.norm(weight - approximation(svd)) for svd in (randomized, exact))
    assert best - sum(shape) * U32 <= residual <= best * (1 + limit) + sum(shape) * U32


def test_singular_values_of_a_known_matrix(seed: int):
    weight = decaying(120, 160, 0.8, seed)
    expected = 0.8 ** torch.arange(10, dtype=torch.float64)
    for svd in (exact_svd(weight, 10), randomized_svd(weight, 10)):
        assert float((svd.sigma - expected).abs().max()) < (120 + 160) * U32


def test_iterations_improve_a_flat_spectrum(seed: int):
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed))
    captured = [float(randomized_svd(weight, 16, iterations=q).sigma.square().sum()) for q in (0, 1, 2, 4)]
    best = float(exact_svd(weight, 16).sigma.square().sum())
    assert captured == sorted(captured)
    assert captured[-1] <= best * (1 + 600 * U32)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_same_input_same_output(method: str):
    weight = torch.randn(150, 200)
    first = truncated_svd(weight, 8, method=method, seed=3)
    torch.manual_seed(1234)  # neither the global generator nor an earlier call matters
    truncated_svd(torch.randn(90, 90), 8, method=method, seed=4)
    state = torch.get_rng_state()
    second = truncated_svd(weight.clone(), 8, method=method, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_is_another_sketch():
    weight = torch.randn(150, 200)
    assert not torch.equal(randomized_svd(weight, 8, seed=0).U, randomized_svd(weight, 8, seed=1).U)


def test_the_weight_is_left_alone():
    weight = torch.randn(150, 200)
    before = weight.clone()
    randomized_svd(weight, 8)
    exact_svd(weight, 8)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_matrix_of_lower_rank_than_asked(method: str):
    weight = torch.randn(150, 3) @ torch.randn(3, 200)
    svd = truncated_svd(weight, 8, method=method)
    check(svd, 150, 200, 8)
    assert float(svd.sigma[3]) <= (150 + 200) * U32 * float(svd.sigma[0])
    assert torch.linalg.norm(approximation(svd) - weight) <= (150 + 200) * U32 * torch.linalg.norm(weight)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_zero_matrix(method: str):
    svd = truncated_svd(torch.zeros(150, 200), 8, method=method)
    check(svd, 150, 200, 8)
    assert not svd.sigma.any()


@pytest.mark.parametrize("scale", [1e-34, 1e-20, 1e20, 1e34])
def test_any_scale(scale: float, seed: int):
    """The Gram matrix of a tiny or huge matrix leaves float32's range: the result does not."""
    weight = (decaying(120, 160, 0.8, seed) * scale).float()
    svd = randomized_svd(weight, 8)
    check(svd, 120, 160, 8)
    expected = torch.linalg.svdvals(weight.double())[:8]
    assert float((svd.sigma - expected).abs().max()) <= (120 + 160) * U32 * float(expected[0])


def test_subnormal_numbers(seed: int):
    check(randomized_svd((decaying(120, 160, 0.8, seed) * 1e-42).float(), 8), 120, 160, 8)


def test_columns_of_very_different_size(seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(300, 280, generator=generator) * 10.0 ** torch.linspace(0, -12, 280)
    svd = randomized_svd(weight, 20)
    check(svd, 300, 280, 20)
    expected = torch.linalg.svdvals(weight.double())[:20]
    assert float((svd.sigma - expected).abs().max()) <= (300 + 280) * U32 * float(expected[0])


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5])
def test_qr(decay: float, by_columns: bool, seed: int, monkeypatch: pytest.MonkeyPatch):
    """Orthonormal, and a factorization, where Cholesky's serves and where Householder's must take over."""
    householder: list[torch.Tensor] = []
    qr = torch.linalg.qr

    def recorded(A: torch.Tensor) -> Any:
        householder.append(A)
        return qr(A)

    monkeypatch.setattr(torch.linalg, "qr", recorded)
    generator = torch.Generator().manual_seed(seed)
    mix = decaying(24, 24, decay, seed).float()
    Y = torch.randn(700, 24, generator=generator) @ mix
    Y = Y.T.contiguous().T if by_columns else Y
    householder.clear()
    Q, R = svd_module._qr(Y)
    assert bool(householder) == (decay == 0.5)  # a condition of 0.5^-23, 10^7
    assert orthonormality_error(Q) < 2 * 724 * 24**0.5 * U32
    assert torch.linalg.norm(Q.double() @ R - Y) < 724 * U32 * torch.linalg.norm(Y)
    rough = svd_module._qr(Y, passes=1)[0]
    assert orthonormality_error(rough) < 0.1


def bits(svd: SVD) -> list[bytes]:
    return [t.numpy().tobytes() for t in svd]


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(600, 512), (300, 777)])
def test_the_same_bits_on_any_number_of_threads(shape: tuple[int, int], method: str, seed: int):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    results = [bits(with_threads(n, lambda: truncated_svd(weight, 20, method=method))) for n in (1, 2, 3)]
    assert results[0] == results[1] == results[2]


def test_the_layout_of_a_working_copy_is_for_speed_only(seed: int):
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(seed))
    W = empty_matrix(weight.shape, weight.device).copy_(weight)
    assert W.shape == weight.shape
    assert W.stride(0) % 64 != 0
    svd, expected = randomized_svd(W, 10), randomized_svd(weight, 10)
    assert torch.allclose(svd.sigma, expected.sigma, rtol=600 * U32, atol=0)


def test_unknown_method():
    with pytest.raises(ConfigError, match="'randomized' or 'exact', got 'lanczos'"):
        truncated_svd(torch.eye(3), 1, method="lanczos")

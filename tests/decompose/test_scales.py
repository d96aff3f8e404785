"""What columns are divided by, and what that does to the decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threads import with_threads

from qosora.decompose.factorize import factorize, factorize_with_report, measure_error, reconstruct
from qosora.decompose.scales import column_scale


def uneven(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose columns differ by a factor of about a hundred."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator) * torch.exp2(2 * torch.randn(n, generator=generator))


class TestColumnScale:
    @given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 2**32))
    def test_norms_over_their_geometric_mean(self, m: int, n: int, seed: int):
        W = uneven(m, n, seed)
        c = column_scale(W)
        assert c.shape == (n,)
        assert c.dtype == torch.float32
        log = torch.linalg.vector_norm(W.double(), dim=0).log2()
        exact = (log - log.mean()).clamp(-8, 8)
        assert (c.double().log2() - exact).abs().max() < 1e-6

    def test_columns_of_zeros_have_one(self):
        W = uneven(8, 16)
        W[:, 3] = 0
        c = column_scale(W)
        rest = torch.arange(16) != 3
        assert c[3] == 1
        assert torch.equal(c[rest], column_scale(W[:, rest]))
        assert (column_scale(torch.zeros(4, 5)) == 1).all()

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_any_size(self, size: float):
        W = uneven(8, 16)
        torch.testing.assert_close(column_scale(W * size), column_scale(W), rtol=1e-6, atol=0)

    def test_extremes_are_bounded(self):
        W = torch.ones(4, 64)
        W[:, 0], W[:, 1] = 1e-12, 1e12
        c = column_scale(W)
        assert c[:2].tolist() == [2.0**-8, 2.0**8]

    def test_same_bits_on_any_number_of_threads(self):
        W = uneven(700, 90)
        assert torch.equal(with_threads(1, lambda: column_scale(W)), with_threads(3, lambda: column_scale(W)))


class TestFactorized:
    def test_the_scaled_weight_is_decomposed(self):
        W = uneven(48, 96)
        c = column_scale(W)
        scaled, plain = factorize(W, 8, scale="columns"), factorize(W / c, 8)
        assert scaled.scale is not None
        assert torch.equal(scaled.scale, c)
        assert plain.scale is None
        assert torch.equal(scaled.residual.packed, plain.residual.packed)
        assert torch.equal(scaled.sigma, plain.sigma)
        assert torch.equal(reconstruct(scaled), reconstruct(plain) * c)
        assert scaled.nbytes == plain.nbytes + 4 * 96

    @pytest.mark.parametrize("blocksize", [32, 64])
    def test_the_error_is_that_of_the_whole(self, blocksize: int):
        W = uneven(30, 70)  # rows end inside of blocks
        factors, report = factorize_with_report(W, 8, scale="columns", blocksize=blocksize)
        error = torch.linalg.vector_norm(W - reconstruct(factors)) / torch.linalg.vector_norm(W)
        assert report.error == pytest.approx(float(error), rel=1e-5)
        assert measure_error(W, factors) == report
        assert report.bits_per_parameter == pytest.approx(8 * factors.nbytes / W.numel())

    def test_small_columns_are_off_by_their_own_size(self):
        W = uneven(64, 128)
        norms = torch.linalg.vector_norm(W, dim=0)

        def worst(scale: str | None) -> float:
            lost = W - reconstruct(factorize(W, 8, scale=scale))
            return float((torch.linalg.vector_norm(lost, dim=0) / norms).max())

        assert worst("columns") < 0.2 < worst(None)

    def test_columns_of_zeros(self):
        W = uneven(16, 64)
        W[:, :5] = 0
        report = factorize_with_report(W, 4, scale="columns")[1]
        assert report.error < report.nf4_error * 2

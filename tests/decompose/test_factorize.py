from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import with_threads
from torch import Tensor

from qosora.decompose import nf4
from qosora.decompose.factorize import (
    ErrorReport,
    Factors,
    factorize,
    factorize_with_report,
    measure_error,
    reconstruct,
    require_float64,
)
from qosora.decompose.nf4 import BLOCKSIZES, QUANT_TYPES
from qosora.errors import CheckpointError, ConfigError

U32 = 2.0**-24  # unit roundoff of float32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DECAY = 0.7


def decaying(m: int, n: int, seed: int = 0) -> Tensor:
    """A random (m, n) matrix with singular values k^-0.7, about as those of trained weights fall."""
    generator = torch.Generator().manual_seed(seed)
    size = min(m, n)
    left = torch.linalg.qr(torch.randn(m, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, size, generator=generator))[0]
    return left * torch.arange(1, size + 1) ** -DECAY @ right.T


def reference_weight(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """R + U diag(σ) Vᵀ in float64, and the sum of the magnitudes that it is computed from."""
    (R, R_abs), (U, U_abs), (V, V_abs) = (reference.dequantize(q) for q in (factors.residual, factors.U, factors.V))
    sigma = reference.array(factors.sigma)
    W = reference.Layer(R, U, V, sigma, np.ones(R.shape[0])).weight()
    return W, R_abs + (U_abs.T * sigma) @ V_abs


def tensors(factors: Factors) -> list[Tensor]:
    parts = (factors.residual, factors.U, factors.V)
    return [*(t for part in parts for t in part.tensors().values()), factors.sigma]


@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    rank=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    svd=st.sampled_from(["randomized", "exact"]),
    quant_type=st.sampled_from(QUANT_TYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_any_shape(
    m: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    svd: str,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
    seed: int,
):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = weight.clone()
    storage: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    factors = factorize(weight, rank, svd=svd, seed=seed, **storage)
    assert torch.equal(weight, before)

    used = min(rank, m, n)
    assert (factors.residual.shape, factors.U.shape, factors.V.shape) == ((m, n), (used, m), (used, n))
    for q in (factors.residual, factors.U, factors.V):
        assert (q.quant_type, q.blocksize, q.absmax_scale is not None) == (quant_type, blocksize, double_quant)
    assert factors.sigma.shape == (used,)
    assert factors.sigma.dtype == torch.float32
    assert factors.nbytes == sum(t.nbytes for t in tensors(factors))

    # The reconstruction is the reference's, but for 3 roundings of each decoded value (see test_nf4), U σ, and a sum
    # of `used` products and R.
    expected, magnitude = reference_weight(factors)
    W = reconstruct(factors)
    assert W.dtype == torch.float32
    assert (np.abs(reference.array(W) - expected) <= (used + 8) * U32 * magnitude).all()

    # The residual absorbs: what is lost is what quantizing it loses, and the factors' own error is not added.
    U_hat, V_hat = nf4.dequantize(factors.U).double(), nf4.dequantize(factors.V).double()
    residual = weight.double() - (U_hat.T * factors.sigma) @ V_hat
    loss_of_residual = torch.linalg.norm(residual - nf4.dequantize(factors.residual))
    slack = (used + 8) * U32 * np.linalg.norm(magnitude + np.abs(reference.array(weight)))
    assert abs(torch.linalg.norm(weight.double() - W) - loss_of_residual) <= 2 * slack


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", [(192, 256), (256, 192), (191, 255)])
def test_below_plain_quantization(shape: tuple[int, int], quant_type: str, rank: int, seed: int):
    weight = decaying(*shape, seed)
    report = measure_error(weight, factorize(weight, rank, quant_type=quant_type))
    assert report.error < report.nf4_error
    # The residual's norm bounds the gain: quantization errors are proportional to the norm of what is quantized.
    energy = torch.arange(1, min(shape) + 1) ** (-2 * DECAY)
    expected = float((energy[rank:].sum() / energy.sum()).sqrt())
    assert report.error / report.nf4_error > 0.9 * expected


def test_error_falls_with_rank(seed: int):
    weight = decaying(192, 256, seed)
    errors = [measure_error(weight, factorize(weight, rank)).error for rank in (16, 32, 64, 96)]
    assert errors == sorted(errors, reverse=True)


def test_report(seed: int):
    weight = decaying(96, 128, seed)
    factors = factorize(weight, 16)
    report = measure_error(weight, factors)
    W, norm = reference.array(weight), np.linalg.norm(reference.array(weight))
    assert report.error == pytest.approx(np.linalg.norm(W - reference_weight(factors)[0]) / norm, rel=1e-5)
    plain = reference.dequantize(nf4.quantize(weight)).value
    assert report.nf4_error == pytest.approx(np.linalg.norm(W - plain) / norm, rel=1e-5)
    assert report.bits_per_parameter == 8 * factors.nbytes / (96 * 128)


@pytest.mark.parametrize("shape", [(120, 160), (160, 121)])
def test_randomized_is_as_good_as_exact(shape: tuple[int, int], seed: int):
    weight = decaying(*shape, seed)
    exact = measure_error(weight, factorize(weight, 16, svd="exact"))
    randomized = measure_error(weight, factorize(weight, 16, svd="randomized", svd_iterations=4))
    # Both residuals have the same norm to well below 1 %; their quantization errors are two draws of a norm over 19,200
    # values, which varies by about 1 / sqrt(2 · 19200) = 0.5 %: this is six such standard deviations.
    assert randomized.error == pytest.approx(exact.error, rel=0.03)


def test_vectors_reconstruct(seed: int):
    factors = factorize(decaying(50, 70, seed), 9)
    s, o = torch.rand(9) + 0.5, torch.randn(50)
    values = [reference.dequantize(q) for q in (factors.residual, factors.U, factors.V)]
    R, U, V = (v.value for v in values)
    R_abs, U_abs, V_abs = (v.magnitude for v in values)
    expected = reference.Layer(R, U, V, reference.array(s), reference.array(o)).weight()
    magnitude = R_abs + np.abs(reference.array(o))[:, None] * ((U_abs.T * reference.array(s)) @ V_abs)
    got = reference.array(reconstruct(factors, s, o))
    assert (np.abs(got - expected) <= (9 + 9) * U32 * magnitude).all()
    assert torch.equal(reconstruct(factors, factors.sigma, torch.ones(50)), reconstruct(factors))


def test_blocks_run_along_each_singular_vector():
    """A singular vector of a few large entries spoils its own blocks only."""
    weight = torch.zeros(64, 64)
    weight[0, 0] = 100.0  # its singular vectors are unit vectors
    weight[1:, 1:] = torch.randn(63, 63)
    factors = factorize(weight, 8, svd="exact", double_quant=False)
    assert factors.U.absmax.shape == (8,)
    assert factors.U.absmax[0] == pytest.approx(1.0)
    assert (factors.U.absmax[1:] < 0.8).all()


@pytest.mark.parametrize("svd", ["randomized", "exact"])
def test_same_input_same_output(svd: str):
    weight = torch.randn(100, 130)
    first = tensors(factorize(weight, 8, svd=svd, seed=5))
    torch.manual_seed(99)
    factorize(torch.randn(80, 80), 8, svd=svd, seed=6)
    second = tensors(factorize(weight.clone(), 8, svd=svd, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def outcome(weight: Tensor, **options: object) -> tuple[list[bytes], ErrorReport]:
    """The bytes and the report of a decomposition."""
    factors, report = factorize_with_report(weight, 16, **options)
    return [t.numpy().tobytes() for t in tensors(factors)], report


@pytest.mark.parametrize("svd", ["randomized", "exact"])
@pytest.mark.parametrize("shape", [(600, 256), (257, 640)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, shape: tuple[int, int], svd: str, seed: int):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = with_threads(1, lambda: outcome(weight, svd=svd))
    for count in (2, 3):
        assert with_threads(count, lambda: outcome(weight, svd=svd)) == expected
    found = []
    thread = threading.Thread(target=lambda: found.append(outcome(weight, svd=svd)))
    thread.start()
    thread.join()
    assert found == [expected]


@pytest.mark.parametrize(
    "state",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["inference_mode", "no_grad", "autocast", "device"],
)
def test_the_same_bits_in_any_state_of_the_caller(state: Callable[[], AbstractContextManager[object]], seed: int):
    weight = decaying(300, 256, seed)
    expected = outcome(weight)
    with state():
        assert outcome(weight) == expected
    assert outcome(torch.nn.Parameter(weight)) == expected


def test_the_same_bits_with_another_default_dtype(seed: int):
    weight = decaying(300, 256, seed)
    expected = outcome(weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert outcome(weight) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@given(
    m=st.integers(1, 90),
    n=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_one_call_equals_two(
    m: int, n: int, dtype: torch.dtype, blocksize: int, double_quant: bool, transposed: bool, seed: int
):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = weight.T if transposed else weight
    options: dict[str, Any] = {"blocksize": blocksize, "double_quant": double_quant}
    factors, report = factorize_with_report(weight, 4, **options)
    two = factorize(weight, 4, **options)
    assert all(torch.equal(a, b) for a, b in zip(tensors(factors), tensors(two), strict=True))
    assert measure_error(weight, two) == report


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-12, 1e12, 1e30])
def test_any_scale(scale: float, seed: int):
    weight = decaying(96, 128, seed)
    expected, report = factorize_with_report(weight, 8)[1], factorize_with_report(weight * scale, 8)[1]
    # Other roundings, so single values go to the neighbouring code.
    assert report.error == pytest.approx(expected.error, rel=0.01)
    assert report.nf4_error == pytest.approx(expected.nf4_error, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_16_bit_weight_is_decomposed_in_float32(dtype: torch.dtype):
    weight = torch.randn(60, 80).to(dtype)
    pairs = zip(tensors(factorize(weight, 8)), tensors(factorize(weight.float(), 8)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("svd", ["randomized", "exact"])
@pytest.mark.parametrize("shape", [(100, 120), (5, 7), (1, 1)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_zero_and_constant(double_quant: bool, shape: tuple[int, int], svd: str):
    zero = factorize(torch.zeros(shape), 4, svd=svd, double_quant=double_quant)
    assert not reconstruct(zero).any()
    assert measure_error(torch.zeros(shape), zero).error == 0
    weight = torch.full(shape, 0.37)
    report = measure_error(weight, factorize(weight, 4, svd=svd, double_quant=double_quant))
    assert report.error < 0.1  # rank 1: what is left to the residual is the factors' own quantization error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_weights_are_refused_by_name(dtype: torch.dtype, value: float):
    weight = torch.randn(30, 40).to(dtype)
    weight[3, 4] = weight[5, 6] = value
    with pytest.raises(CheckpointError, match=r"^layers\.3\.up_proj: 2 of 1200 values are NaN or infinite"):
        factorize(weight, 4, name="layers.3.up_proj")


@pytest.mark.parametrize("weight", [torch.randn(5), torch.randn(2, 3, 4), torch.ones(3, 4, dtype=torch.int8)])
def test_only_floating_point_matrices(weight: Tensor):
    with pytest.raises(CheckpointError, match=r"^conv: only floating-point matrices .* modules_to_not_convert"):
        factorize(weight, 4, name="conv")


def test_unknown_svd():
    with pytest.raises(ConfigError, match="svd method"):
        factorize(torch.randn(4, 4), 2, svd="magic")


@pytest.mark.parametrize("offset", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_wherever_the_weight_lies(dtype: torch.dtype, offset: int, seed: int):
    """As in a mapped file, where it begins anywhere: some processors' products round differently there."""
    weight = torch.randn(56, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
    moved = torch.empty(weight.numel() + offset, dtype=dtype)[offset:].view(weight.shape).copy_(weight)
    assert moved.data_ptr() % 64
    expected, got = factorize(weight, 8), factorize(moved, 8)
    assert torch.equal(got.sigma, expected.sigma)
    for part in ("residual", "U", "V"):
        for name, tensor in vars(getattr(expected, part)).items():
            found = getattr(getattr(got, part), name)
            assert torch.equal(found, tensor) if isinstance(tensor, torch.Tensor) else found == tensor, (part, name)
    assert measure_error(moved, got) == measure_error(weight, expected)


def test_apples_gpus_are_refused_in_a_line():
    require_float64(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"float64, which Apple's GPUs have not: decompose on the CPU"):
        require_float64(torch.device("mps"))

"""Matrices in 8 bits: how near they are, and what is at their edges."""

from __future__ import annotations

import pytest
import torch

from qosora.decompose import int8
from qosora.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_value_is_within_half_a_scale(dtype: torch.dtype):
    weight = torch.randn(37, 64).mul(torch.logspace(-6, 3, 37)[:, None]).to(dtype)
    codes, scales = int8.quantize(weight, "w")
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.int8, (37, 64), torch.float32, (37,))
    assert codes.abs().amax(1).eq(127).all()
    error = (int8.dequantize(codes, scales, torch.float32).double() - weight.double()).abs()
    assert (error <= scales.double()[:, None] * 0.5001).all()
    got = int8.dequantize(codes, scales, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, (codes.float() * scales[:, None]).to(dtype))


def test_pieces_are_as_the_whole(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(37, 64)
    whole = int8.quantize(weight, "w")
    monkeypatch.setattr(int8, "_PIECE", 5 * 64)
    for got, expected in zip(int8.quantize(weight, "w"), whole, strict=True):
        assert torch.equal(got, expected)


def test_rows_of_nothing():
    weight = torch.randn(4, 8)
    weight[1], weight[2] = 0, 1e-44
    codes, scales = int8.quantize(weight, "w")
    assert not codes[1:3].any()
    assert int8.dequantize(codes, scales, torch.float32).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad: float):
    weight = torch.randn(4, 8)
    weight[2, 5] = bad
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: 1 of 32 values are NaN or infinite"):
        int8.quantize(weight, "embed_tokens.weight")

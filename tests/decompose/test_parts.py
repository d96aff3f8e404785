"""What a decomposition is stored as: names, shapes, and there and back."""

from __future__ import annotations

import pytest
import torch

from qosora.decompose import parts
from qosora.decompose.factorize import factorize


@pytest.mark.parametrize("double_quant", [True, False])
def test_there_and_back(double_quant: bool):
    factors = factorize(torch.randn(24, 40), 4, blocksize=32, double_quant=double_quant)
    stored = parts.tensors(factors)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    assert found == parts.stored_shapes(24, 40, 4, 32, double_quant)
    assert list(stored) == [name for part in parts.PARTS for name in parts.stored_names(part, double_quant)]
    again = parts.factors({**stored, "bias": torch.ones(1)}, parts.shapes(24, 40, 4), factors.sigma, "nf4", 32)
    assert again == factors  # the same tensors


def test_names():
    assert parts.stored_names("residual") == [
        "weight", "weight_absmax", "weight_absmax_scale", "weight_absmax_offset"
    ]  # fmt: skip
    assert parts.stored_names("U", double_quant=False) == ["U", "U_absmax"]

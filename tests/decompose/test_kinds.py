"""Kinds of 4-bit tensors: all that are named can be made."""

from __future__ import annotations

import pytest
import torch

from qosora.decompose import nf4
from qosora.decompose.kinds import BLOCKSIZES, QUANT_TYPES


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_each_kind_can_be_made(quant_type: str, blocksize: int, seed: int):
    x = torch.randn(4, 2 * max(BLOCKSIZES), generator=torch.Generator().manual_seed(seed))
    q = nf4.quantize(x, quant_type=quant_type, blocksize=blocksize)
    assert (nf4.dequantize(q) - x).norm() < 0.2 * x.norm()

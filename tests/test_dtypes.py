"""Dtypes and their names."""

from __future__ import annotations

import pytest
import torch

import qosora.training.config as training_config
from qosora.dtypes import COMPUTE_DTYPES, PRECISIONS, dtype_name, dtype_named
from qosora.errors import ConfigError


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", "bf16", torch.bfloat16], ids=str)
def test_all_names_of_one(name: str | torch.dtype):
    assert dtype_named(name) is torch.bfloat16


def test_names_and_dtypes_are_inverse():
    assert [dtype_name(dtype_named(name)) for name in COMPUTE_DTYPES] == list(COMPUTE_DTYPES)
    assert {dtype_name(dtype) for dtype in PRECISIONS.values()} == set(COMPUTE_DTYPES)
    assert dtype_name(torch.float64) == dtype_name("torch.float64") == dtype_name("float64") == "float64"


def test_precisions_of_a_run():
    assert set(training_config.PRECISIONS) == {"auto", *PRECISIONS}


@pytest.mark.parametrize("name", ["bfloat61", "nn", "", "auto"])
def test_no_dtype(name: str):
    with pytest.raises(ConfigError, match=f"there is no dtype '{name}'; name one of torch's, such as float32"):
        dtype_named(name)

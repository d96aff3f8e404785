"""Which device a computation is for."""

from __future__ import annotations

import torch

from qosora.layers.device import device_type, planning_for


def test_a_tensors_own():
    assert device_type(torch.empty(1)) == "cpu"
    with planning_for("cuda"):
        assert device_type(torch.empty(1)) == "cpu"


def test_without_memory_the_planned_one():
    tensor = torch.empty(1, device="meta")
    assert device_type(tensor) == "meta"
    with planning_for("cuda"):
        assert device_type(tensor) == "cuda"
        with planning_for("cpu"):
            assert device_type(tensor) == "cpu"
        assert device_type(tensor) == "cuda"
    assert device_type(tensor) == "meta"

"""Which device a computation is for."""

from __future__ import annotations

import torch

from qosora.layers.device import device_type, peaks_alone, pieces, planning_for


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


def test_pieces_for_the_peak_alone():
    assert pieces(range(5)) == range(5)
    with peaks_alone():
        assert pieces(range(5)) == range(3)
        assert pieces((1, 2)) == (1, 2)
    assert pieces(range(5)) == range(5)

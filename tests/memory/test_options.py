"""What a planned step may be told."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig

from qosora.memory.options import StepOptions, has_experts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "lora"}, "method must be one of qosora, qlora, got 'lora'"),
        ({"vectors": "c"}, "vectors must be one of both, s, o, got 'c'"),
        ({"attn_implementation": "fast"}, "attn_implementation must be one of sdpa, eager, got 'fast'"),
        ({"update_rank": -1}, "update_rank must be at least 0, got -1"),
        ({"tile_length": -1}, "tile_length must be at least 0, got -1"),
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"strategy": "fsdp"}, "strategy fsdp divides a base among several GPUs: say how many with gpus"),
        ({"device": "cpu", "base_on": "host"}, "base_on and gpus are about GPUs, and device is cpu"),
        (
            {"device": "cpu", "activation_offloading": True},
            "activation_offloading moves activations from a GPU to host memory, and there is no GPU",
        ),
    ],
)
def test_what_cannot_be(options: dict[str, Any], expected: str):
    assert StepOptions().problems() == []
    assert StepOptions(**options).problems() == [expected]


def test_all_problems_at_once():
    assert len(StepOptions(method="lora", precision="int8", update_rank=-1).problems()) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"base_on": "host"}, "host"),
        ({"base_on": "host", "method": "qlora"}, None),
        ({"strategy": "fsdp", "gpus": 2}, "fsdp"),
        ({"strategy": "fsdp", "gpus": 2, "base_on": "host"}, "host"),
    ],
)
def test_where_the_base_comes_from(options: dict[str, Any], expected: str | None):
    assert StepOptions(**options).away == expected


def test_a_mixture_has_experts():
    assert has_experts(MixtralConfig())
    assert not has_experts(LlamaConfig())

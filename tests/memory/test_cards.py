"""`qosora.memory.cards`: what CUDA adds on which card, and that plans say which of it was measured."""

from __future__ import annotations

import pytest

from qosora.memory import StepOptions, TracedModel, model_config, usage_of
from qosora.memory.cards import ASSUMPTIONS, GPUS, MIB, Card, the_card
from qosora.memory.plan import storage_of
from qosora.memory.step import Batch


@pytest.mark.parametrize(
    ("name", "context", "workspaces"),
    [
        ("NVIDIA H200", 900, 64),
        ("NVIDIA H100 80GB HBM3", 900, 64),
        ("NVIDIA B200", 900, 64),
        ("NVIDIA GeForce RTX 5090", 450, 64),
        ("RTX 4090", 450, 16.25),
        ("NVIDIA A100-SXM4-80GB", 450, 16.25),
        ("24 GiB", 450, 16.25),
    ],
)
def test_what_cuda_adds(name: str, context: float, workspaces: float):
    card = Card(name, None)
    assert card.context_bytes == context * MIB
    assert card.workspace_bytes == workspaces * MIB


def test_names_in_the_table_are_as_those_that_cuda_reports():
    assert {name for name in GPUS if the_card(name).context_bytes == 900 * MIB} == {"H100", "H200"}


def test_plans_take_it_from_the_card():
    config, options = model_config("llama-3.2-1b"), StepOptions()
    found = TracedModel(config, storage_of(config, 8), options).predict(Batch(1, 64))
    small, large = (usage_of(found, the_card(name), options.device) for name in ("RTX 5090", "H200"))
    assert large.total_bytes - small.total_bytes == 450 * MIB
    assert large.allocated_bytes == small.allocated_bytes


def test_it_is_told_what_was_measured_and_what_not():
    context = next(text for text in ASSUMPTIONS if "CUDA context" in text)
    assert "900 MiB on H100, H200, B200 (H200: 767 to 897 MiB measured) and 450 MiB" in context
    assert context.endswith("(not measured)")
    assert "H200" in ASSUMPTIONS[0]

"""Cards by name and by memory; what CUDA adds on which, and that plans say which of it was measured."""

from __future__ import annotations

import pytest

from qosora.errors import ConfigError
from qosora.memory import StepOptions, TracedModel, model_config, usage_of
from qosora.memory.cards import ASSUMPTIONS, ATTAINED, GIB, GPUS, MIB, TFLOPS, Card, parse_bytes, the_card
from qosora.memory.options import Batch
from qosora.memory.plan import storage_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("1.5gib", int(1.5 * GIB)), ("512MiB", 2**29), ("7B", 7)],
)
def test_sizes(text: str, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "24", "GiB", "-1GiB", "0GiB", "24XiB", "24 GiB extra", "1e3GiB"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(ConfigError, match="memory size"):
        parse_bytes(text)


@pytest.mark.parametrize(("name", "expected"), [("RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 3090", "RTX 3090")])
def test_cards_by_name(name: str, expected: str):
    assert the_card(name).name == expected


def test_a_name_that_means_several_cards_is_refused():
    with pytest.raises(ConfigError, match="A100 40GB, A100 80GB"):
        the_card("A100")


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


def test_each_card_has_its_own_rate() -> None:
    assert TFLOPS.keys() == GPUS.keys()
    assert {name: the_card(name).tflops for name in GPUS} == {name: ATTAINED * peak for name, peak in TFLOPS.items()}
    assert the_card(memory="24GiB").tflops is None

"""Cards by name and by memory."""

from __future__ import annotations

import pytest

from qosora.errors import ConfigError
from qosora.memory.cards import GIB, parse_bytes, the_card


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

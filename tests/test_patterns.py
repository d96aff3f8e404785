"""Regular expressions for modules: what is usual works, what could take for ever is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qosora.base import load_base, load_model
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import CheckpointError, ConfigError
from qosora.patterns import matches_module, pattern_problem

STORED = Path(__file__).parent / "stored"
USUAL = [
    "down_proj", "layers.3.mlp", r"model\.layers\.\d+\.mlp\.(up|down)_proj", r".*\.(q|k|v)_proj", r"layers\.[0-3]\..*",
    r"(model\.)?layers\.(1[0-9]|2\d)\.self_attn\.[qkv]_proj", r".*experts\.\d{1,3}\.w[123]", r"^(?!.*lm_head).*proj$",
    r"(?:a|b)\.x?", r"[(*+|)]+", r"\(\+\)*", r"(ab){2}c+", r"h\.\d+\.attn\.c_(?:attn|proj)", "",
]  # fmt: skip
ENDLESS = [
    "(a+)+", "(a*)*b", r"(.*)*", r"(\w+\.)+x", "(a|a)*", "(a|ab)+c", "((a+)b)*", "(a{1,}){2,}", "(?:x+)+", "(?P<n>a*)+",
    r"(\d+,?)*", "(a?b+)*?", ".*.*.*.*.*.*x", "([a]+)+", r"(\(+)+", "((a|b)c)*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_usual(pattern: str):
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize("pattern", ENDLESS)
def test_endless(pattern: str):
    said = "could take for ever"
    assert said in str(pattern_problem(pattern))
    refused: list[tuple[Any, dict[str, Any]]] = [
        (QosoraConfig, {"rank_pattern": {pattern: 4}}),
        (QosoraConfig, {"modules_to_not_convert": [pattern]}),
        (OsoraConfig, {"target_modules": pattern}),
        (OsoraConfig, {"exclude_modules": pattern}),
        (OsoraConfig, {"modules_to_save": [pattern]}),
    ]
    for made, options in refused:
        with pytest.raises(ConfigError, match=said):
            made(**options)


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[", "a" * 9 + "(" * 5000 + ")" * 5000, "a{99999999999999999999}"])
def test_no_expression(pattern: str):
    assert "is not a regular expression" in str(pattern_problem(pattern))


@pytest.mark.parametrize("pattern", [None, 3, ["a"], b"a"])
def test_no_name(pattern: Any):
    assert pattern_problem(pattern) == "is not a name"


def test_files_of_others(tmp_path: Path):
    for folder, file, change in (
        ("base-2", "config.json", lambda c: c["quantization_config"].update(rank_pattern={"(a+)+$": 3})),
        ("adapter-2", "adapter_config.json", lambda c: c.update(target_modules="(a+)+$")),
    ):
        copy = shutil.copytree(STORED / folder, tmp_path / folder)
        config = json.loads((copy / file).read_text())
        change(config)
        (copy / file).write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"\(a\+\)\+\$.* could take for ever") as error:
            (load_base if folder == "base-2" else load_model)(copy)
        assert "\n" not in str(error.value)


def test_a_pattern_means_a_name_or_its_end():
    assert matches_module("up_proj", "model.layers.0.mlp.up_proj")
    assert matches_module(r"layers\.\d\.mlp\..*", "model.layers.0.mlp.up_proj")
    assert not matches_module("p_proj", "model.layers.0.mlp.up_proj")

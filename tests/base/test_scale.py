"""Bases without a scale are as they always were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny import load, make_base, make_checkpoint

from qosora.base.convert import quantize
from qosora.config import QosoraConfig
from qosora.errors import ConfigError


def test_nothing_is_written_of_no_scale(tmp_path: Path):
    base = make_base(tmp_path / "base")
    quantize(tmp_path / "base-source", tmp_path / "streamed", QosoraConfig(rank=8))
    for folder in (base, tmp_path / "streamed"):
        assert "scale" not in json.loads((folder / "config.json").read_text())["quantization_config"]
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert not [name for name in file.keys() if name.endswith(".c")]  # noqa: SIM118
    assert "scale" not in json.loads((tmp_path / "streamed" / "qosora_manifest.json").read_text())["made_with"]
    assert load(base).config.quantization_config.scale is None


def test_other_weights_and_config_with_one(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source")
    quantize(source, tmp_path / "base", QosoraConfig(rank=8, scale="columns"))
    loaded = load(tmp_path / "base")
    assert loaded.config.quantization_config.scale == "columns"
    assert loaded.config.quantization_config.to_dict() == QosoraConfig(rank=8, scale="columns").to_dict()
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


@pytest.mark.parametrize("scale", ["rows", True, 1.0])
def test_other_values_are_refused(scale: Any):
    with pytest.raises(ConfigError, match="scale must be one of None, columns, got"):
        QosoraConfig(scale=scale)

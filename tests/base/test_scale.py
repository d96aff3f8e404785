"""How a base says which scale it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import assert_same_tensors, load, make_base, make_checkpoint

from qosora.base.convert import quantize
from qosora.config import QosoraConfig
from qosora.errors import ConfigError
from qosora.export import export_merged
from qosora.memory.plan import plan


def test_without_one(tmp_path: Path):
    config = QosoraConfig(rank=8, scale=None)
    base = make_base(tmp_path / "base", config=config)
    quantize(tmp_path / "base-source", tmp_path / "streamed", config)
    for folder in (base, tmp_path / "streamed"):
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["scale"] is None
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert not [name for name in file.keys() if name.endswith(".c")]  # noqa: SIM118
    assert load(base).config.quantization_config.scale is None


def test_the_first_bases_had_none_and_do_not_say_so(tmp_path: Path):
    base = make_base(tmp_path / "base", config=QosoraConfig(rank=8, scale=None))
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]["scale"]
    before = load(base).state_dict()
    (base / "config.json").write_text(json.dumps(config))
    old = load(base)
    assert old.config.quantization_config.scale is None
    assert_same_tensors(old.state_dict(), before)
    export_merged(base, tmp_path / "merged")
    assert plan(base, seq_len=32, grid=False, compare=False).usage.rows["factors"] > 0


def test_other_weights_and_config_with_one(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source")
    quantize(source, tmp_path / "base", QosoraConfig(rank=8, scale="columns"))
    loaded = load(tmp_path / "base")
    assert loaded.config.quantization_config.scale == "columns"
    assert loaded.config.quantization_config.to_dict() == QosoraConfig(rank=8, scale="columns").to_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert_same_tensors(*(load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "base")))


@pytest.mark.parametrize("scale", ["rows", True, 1.0])
def test_other_values_are_refused(scale: Any):
    with pytest.raises(ConfigError, match="scale must be one of None, columns, calibrated, got"):
        QosoraConfig(scale=scale)

"""What a folder holds, told from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from tiny import tiny_config

from qosora.checkpoints.stored_config import (
    adapter_config,
    base_storage,
    load_config,
    quantization_in,
    require_base,
    split_source,
)
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import CheckpointError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Configurations alone: source (ordinary), base, adapter, lora."""
    config = tiny_config()
    config.save_pretrained(tmp_path / "source")
    config.quantization_config = QosoraConfig(rank=8).to_dict()
    config.save_pretrained(tmp_path / "base")
    OsoraConfig(vectors="s", base_model_name_or_path=str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "lora")
    return tmp_path


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_what_a_base_is(place: Path) -> None:
    config = load_config(place / "base")
    stored = require_base("base", config)
    assert (stored["quant_method"], stored["rank"]) == ("qosora", 8)
    assert base_storage(config) == quantization_in(config) == stored
    assert require_base("base", json.loads((place / "base" / "config.json").read_text())) == stored


def test_what_is_no_base(place: Path) -> None:
    ordinary = load_config(place / "source")
    assert quantization_in(ordinary) is base_storage(ordinary) is None
    with pytest.raises(
        CheckpointError, match=r"source is an ordinary checkpoint, not a qosora base\. .*quantize SRC OUT"
    ):
        require_base(place / "source", ordinary)
    change(place / "base" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    other = load_config(str(place / "base"))
    assert quantization_in(other) == {"quant_method": "gptq", "bits": 4}
    assert base_storage(other) is None
    with pytest.raises(CheckpointError, match="is quantized with 'gptq', not a qosora base"):
        require_base(place / "base", other)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"base: no model there that transformers can load \("),
        ("{", r"config\.json: not valid JSON"),
        ("[1, 2]", r"config\.json: expected a JSON object, got list"),
        ("null", r"config\.json: expected a JSON object"),
        ("[" * 100_000, r"config\.json: not valid JSON"),
        ('{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}", r"config\.json: not valid JSON"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', r"config\.json: num_hidden_layers is 1000000000"),
        ('{"model_type": "unheard-of"}', r"config\.json: no model there that transformers can load \("),
        ('{"model_type": ["llama"]}', r"config\.json: no model there that transformers can load \("),
        (
            '{"model_type": "llama", "rope_parameters": 7}',
            r"config\.json: no model there that transformers can load \(",
        ),
    ],
)
def test_no_model(place: Path, content: str | None, said: str) -> None:
    file = place / "base" / "config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_config(place / "base")
    assert "\n" not in str(caught.value)


def test_adapters(place: Path) -> None:
    found = adapter_config(place / "adapter")
    assert isinstance(found, OsoraConfig)
    assert found.vectors == "s"
    with pytest.raises(CheckpointError, match="an adapter of type LORA, not one of qosora's"):
        adapter_config(place / "lora")
    with pytest.raises(CheckpointError, match="no adapter that PEFT can load"):
        adapter_config(place / "base")


def test_split_source(place: Path) -> None:
    base, adapter = str(place / "base"), str(place / "adapter")
    assert split_source(base) == (base, None)
    assert split_source(adapter) == (base, adapter)
    assert split_source(adapter, "moved") == ("moved", adapter)
    assert split_source("user/adapter-on-the-hub", base) == (base, "user/adapter-on-the-hub")
    change(place / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"adapter_config.json names no base; give it with --base"):
        split_source(adapter)

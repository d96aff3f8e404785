"""What `describe` tells, against the loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import get_peft_model
from tiny import make_base
from transformers import AutoModelForCausalLM

from qosora import OsoraConfig
from qosora.adapter import model_fingerprint
from qosora.base.describe import describe
from qosora.errors import CheckpointError


def test_base_and_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama-tied-bias")
    model = AutoModelForCausalLM.from_pretrained(base)
    found = describe(base)
    assert found["kind"] == "base"
    assert found["fingerprint"] == model_fingerprint(model)
    assert found["decomposed_layers"] == 14
    assert found["total_bytes"] == sum(p.nbytes for p in model.parameters())
    assert found["by_kind"] is None  # saved by save_pretrained, which measures no errors

    adapted = get_peft_model(model, OsoraConfig(vectors="s", modules_to_save=["norm"]))
    adapted.save_pretrained(tmp_path / "adapter")
    vectors = {n: p for n, p in adapted.named_parameters() if "osora_s" in n}
    told = describe(tmp_path / "adapter")
    assert told["kind"] == "adapter"
    assert told["base_fingerprint"] == found["fingerprint"]
    assert told["adapter_parameters"] == sum(p.numel() for p in vectors.values())
    assert told["adapted_layers"] == len(vectors) == 14
    assert told["other_parameters"] == 5 * 32
    assert told["file_bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_the_predicted_adapter_is_the_real_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), OsoraConfig())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert describe(base)["adapter_parameters"] == trained


def test_neither(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config.json nor adapter_config.json"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="not a qosora base"):
        describe(tmp_path)

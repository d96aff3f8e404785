"""Adapters as they are read from files, alone and combined."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import edit_tensors, refused
from safetensors.torch import load_file
from tiny import (
    Trained,
    load,
    logits,
    make_base,
    perturbed,
    relative_difference,
)
from transformers import AutoModelForCausalLM

from qosora.base.convert import quantize
from qosora.checkpoints.folders import read_json, write_json
from qosora.config import QosoraConfig
from qosora.errors import ConfigError, FingerprintError
from qosora.export import export_lora, export_merged
from qosora.layers.linear import qosora_modules


def test_a_linear_combination(tiny: Trained, tmp_path: Path):
    other = perturbed(load(tiny.base), seed=5, vectors="s")
    other.save_pretrained(tmp_path / "other")
    weights = {tiny.adapter: 0.7, tmp_path / "other": -0.3}
    report = export_merged(tiny.base, tmp_path / "merged", weights)
    assert report.adapters == {str(folder): weight for folder, weight in weights.items()}
    model = load(tiny.base)
    states = [load_file(folder / "adapter_model.safetensors") for folder in weights]
    for name, layer in qosora_modules(model).items():
        for kind, base in (("s", layer.s), ("o", layer.o)):
            key = f"base_model.model.{name}.osora_{kind}"
            changes = [
                w * (state[key] - base) for state, w in zip(states, weights.values(), strict=True) if key in state
            ]
            base.data = base + sum(changes)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    assert relative_difference(merged, logits(model)) < 1e-5
    alone = logits(tiny.model)
    assert relative_difference(merged, alone) > 0.02

    lora = export_lora(tiny.base, tmp_path / "lora", weights, original=tiny.original)
    assert lora.adapted_layers == 14


def test_combinations_that_make_no_sense(tiny: Trained, tmp_path: Path):
    full = perturbed(load(tiny.base), modules_to_save=["norm"])
    full.save_pretrained(tmp_path / "full")
    refused(tmp_path, r"brings model\..*norm.weight, trained in full", tiny.base, {tmp_path / "full": 0.5})
    refused(tmp_path, "a finite number, got nan", tiny.base, {tiny.adapter: math.nan}, error=ConfigError)
    quantize(tiny.original, tmp_path / "base", QosoraConfig(rank=7))
    perturbed(load(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    pair = {tiny.adapter: 0.5, tmp_path / "adapter": 0.5}
    refused(tmp_path, "adapter was trained on the base with", tiny.base, pair, error=FingerprintError)


def test_not_an_adapter(tiny: Trained, copies: Trained, tmp_path: Path):
    refused(tmp_path, "no adapter", tiny.base, tiny.base)
    config = read_json(copies.adapter / "adapter_config.json")
    lora = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    write_json(copies.adapter / "adapter_config.json", lora)
    refused(tmp_path, "LORA", tiny.base, copies.adapter)
    write_json(copies.adapter / "adapter_config.json", config)
    (copies.adapter / "adapter_model.safetensors").unlink()
    (copies.adapter / "adapter_model.bin").write_bytes(b"pickle")
    refused(tmp_path, "adapter_model.bin is pickled", tiny.base, copies.adapter)


def test_an_adapter_of_another_base(tiny: Trained, tmp_path: Path):
    other = make_base(tmp_path / "other", tiny.original, QosoraConfig(rank=7))
    with pytest.raises(FingerprintError) as info:
        export_merged(other, tmp_path / "export", tiny.adapter)
    fingerprint = read_json(tiny.adapter / "adapter_config.json")["base_fingerprint"]
    assert fingerprint in str(info.value)
    assert export_merged(other, tmp_path / "export").fingerprint in str(info.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_the_adapter(tiny: Trained, copies: Trained, tmp_path: Path, bad: float):
    key = "base_model.model.model.layers.1.mlp.down_proj.osora_o"
    edit_tensors(copies.adapter / "adapter_model.safetensors", lambda t: t[key].__setitem__(3, bad))
    refused(tmp_path, rf"{key} holds NaN or infinity", tiny.base, copies.adapter)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.osora_s"), "no s for model.layers.0.mlp.up_proj"),
        (lambda t: t.update({"base_model.model.model.layers.7.mlp.up_proj.osora_s": torch.ones(8)}), "layers.7"),
        (lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.osora_s": torch.ones(9)}), r"\(9,\)"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(5)}), r"norm.weight.*\(5,\)"),
        (lambda t: t.update({"base_model.model.model.other.weight": torch.ones(5)}), "other.weight is neither"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.full((32,), torch.nan)}), "norm.weight.*NaN"),
    ],
)
def test_a_damaged_adapter(tiny: Trained, copies: Trained, tmp_path: Path, edit: Any, match: str):
    edit_tensors(copies.adapter / "adapter_model.safetensors", edit)
    refused(tmp_path, match, tiny.base, copies.adapter, kept="NaN" in match)  # found late

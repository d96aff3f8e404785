"""Exports as LoRA: exactly what was learned, or the nearest of a lower rank."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from exports import expected_logits, learned, tensors_of
from peft import LoraConfig, PeftModel
from tiny import (
    Trained,
    load,
    logits,
    make_checkpoint,
    make_trained,
    perturbed,
    relative_difference,
)
from transformers import AutoModelForCausalLM

from qosora.base.convert import quantize
from qosora.config import QosoraConfig
from qosora.errors import ConfigError
from qosora.export import export_lora, export_merged
from qosora.export.lora import reduced

# PEFT stacks experts' matrices and their ranks, then looks for the ranks among modules only.
pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")


def test_lora_config(tmp_path: Path):
    trained = make_trained(tmp_path, "llama-bias", target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    report = export_lora(trained.base, tmp_path / "lora", trained.adapter, dtype="float16")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.lora_alpha == config.r == report.rank == 8
    assert config.target_modules == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert (config.base_model_name_or_path, config.fan_in_fan_out) == ("../original", False)
    tensors = tensors_of(tmp_path / "lora", "adapter_model")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    assert (tensors[f"{key}A.weight"].shape, tensors[f"{key}B.weight"].shape) == ((8, 56), (32, 8))
    assert len(tensors) == 4
    assert "base_model: original" in (tmp_path / "lora" / "README.md").read_text()


def test_ranks_that_differ_keep_the_scaling(tmp_path: Path):
    original = make_checkpoint(tmp_path / "original", "gpt2")
    quantize(original, tmp_path / "base", QosoraConfig(rank=8, rank_pattern={"c_attn": 5, "h.0.mlp.c_fc": 3}))
    model = perturbed(load(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "base", tmp_path / "lora", tmp_path / "adapter")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.fan_in_fan_out
    assert config.alpha_pattern == config.rank_pattern
    assert {"c_attn": 5, "transformer.h.0.mlp.c_fc": 3}.items() <= config.rank_pattern.items()
    plain = AutoModelForCausalLM.from_pretrained(original)
    got = logits(PeftModel.from_pretrained(plain, tmp_path / "lora").eval())
    trained = Trained(original, tmp_path / "base", tmp_path / "adapter", model)
    assert relative_difference(got, expected_logits(trained)) < 1e-5


def test_modules_trained_in_full_are_in_both(tmp_path: Path):
    trained = make_trained(tmp_path, "llama-bias", modules_to_save=["lm_head", "norm"])
    export_merged(trained.base, tmp_path / "merged", trained.adapter, onto="original")
    report = export_lora(trained.base, tmp_path / "lora", trained.adapter)
    assert {"lm_head.weight", "model.norm.weight"} < set(report.replaced)
    assert set(LoraConfig.from_pretrained(tmp_path / "lora").modules_to_save) == {"lm_head", "norm"}
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    plain = AutoModelForCausalLM.from_pretrained(trained.original)
    assert not torch.equal(tensors_of(tmp_path / "merged")["lm_head.weight"], plain.lm_head.weight)
    assert relative_difference(logits(PeftModel.from_pretrained(plain, tmp_path / "lora").eval()), merged) < 1e-5


def test_reduced_rank_is_the_best_one(tiny: Trained, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(40, 8, generator=generator), torch.randn(8, 30, generator=generator)
    small_B, small_A, S = reduced(B, A, 3)
    U, singular, Vh = torch.linalg.svd(B.double() @ A.double())
    torch.testing.assert_close(S, singular[:8])
    torch.testing.assert_close(small_B @ small_A, U[:, :3] * singular[:3] @ Vh[:3])

    report = export_lora(tiny.base, tmp_path / "lora", tiny.adapter, rank=3)
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.r == config.lora_alpha == report.rank == 3
    tensors = tensors_of(tmp_path / "lora", "adapter_model")
    deltas, lost = learned(tiny), 0.0
    for name, delta in deltas.items():
        key = f"base_model.model.{name}.lora_"
        made = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
        singular = torch.linalg.svdvals(delta)
        assert math.isclose(float(torch.linalg.norm(delta - made)), float(singular[3:].norm()), rel_tol=1e-4)
        lost += float(singular[3:].square().sum())
    whole = sum(float(delta.square().sum()) for delta in deltas.values())
    assert math.isclose(report.rank_error, math.sqrt(lost / whole), rel_tol=1e-5)
    assert export_lora(tiny.base, tmp_path / "whole", tiny.adapter, rank=100).rank_error == 0.0


def test_options_that_make_no_sense(tiny: Trained, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"2 problems:\n- dtype .*\n- rank must be .* got 0"):
        export_lora(tiny.base, tmp_path / "lora", tiny.adapter, dtype="int8", rank=0)

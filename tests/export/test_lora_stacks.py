"""Experts as LoRAs of whole parameters, loaded by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import expected_logits, tensors_of
from peft import LoraConfig, PeftModel
from tiny import VOCAB, Trained, load, logits, make_checkpoint, perturbed, relative_difference
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from qosora.base.convert import quantize
from qosora.config import QosoraConfig
from qosora.export import export_lora, export_merged

# PEFT stacks experts' matrices and their ranks, then looks for the ranks among modules only.
pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
#: Matrices by columns that PEFT knows to be so, and that it does not know so; rows in a `weight`; experts by name
#: beside dense layers and shared experts of their name, of families that PEFT knows and one that it does not.
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt_oss": GptOssConfig(**SIZES),
    "llama4": Llama4TextConfig(**SIZES, intermediate_size_mlp=40),
    "jetmoe": JetMoeConfig(
        **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_attention_heads")}, kv_channels=8
    ),
    "deepseek_v3": DeepseekV3Config(
        **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}, num_key_value_heads=4,
        n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=1, n_group=2,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, mlp_only_layers=[0]),
}  # fmt: skip


def made(folder: Path, config: PreTrainedConfig, storage: QosoraConfig | None = None, **adapter: Any) -> Trained:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "original")
    quantize(folder / "original", folder / "base", storage or QosoraConfig(rank=8))
    model = perturbed(load(folder / "base"), **adapter)
    model.save_pretrained(folder / "adapter")
    return Trained(folder / "original", folder / "base", folder / "adapter", model)


def served(trained: Trained, lora: Path) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(trained.original, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(plain, lora).eval())


def onto_original(trained: Trained, folder: Path) -> torch.Tensor:
    export_merged(trained.base, folder, trained.adapter, onto="original")
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize(
    ("family", "update_rank"), [*((family, 0) for family in CONFIGS), ("llama4", 2), ("qwen3_moe", 2)]
)
@pytest.mark.slow
def test_peft_gives_what_merging_onto_the_original_gives(family: str, update_rank: int, tmp_path: Path):
    trained = made(tmp_path, CONFIGS[family], update_rank=update_rank)
    report = export_lora(trained.base, tmp_path / "lora", trained.adapter)
    assert report.adapted_layers > 8
    expected = onto_original(trained, tmp_path / "merged")
    assert relative_difference(served(trained, tmp_path / "lora"), expected) < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(trained.original, dtype=torch.float32)
    assert relative_difference(logits(plain.eval()), expected) > 1e-2


def test_the_config_names_parameters_and_their_ranks(tmp_path: Path):
    trained = made(tmp_path, CONFIGS["qwen3_moe"])
    export_lora(trained.base, tmp_path / "lora", trained.adapter)
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    experts = "model.layers.1.mlp.experts"
    dense = {f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert set(config.target_parameters) == {f"{experts}.gate_up_proj", f"{experts}.down_proj"} | dense
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert config.rank_pattern == config.alpha_pattern == {f"{experts}.gate_up_proj": 16}
    assert config.r == config.lora_alpha == 8
    tensors = tensors_of(tmp_path / "lora", "adapter_model")
    inner, outer = (f"base_model.model.{experts}{at}.lora_" for at in (".base_layer", ""))
    shapes = {
        key.removeprefix("base_model.model."): tuple(tensors[key].shape)
        for key in (f"{inner}A.weight", f"{inner}B.weight", f"{outer}A.weight", f"{outer}B.weight")
    }
    assert list(shapes.values()) == [(4 * 16, 32), (48, 4 * 16), (4 * 8, 24), (32, 4 * 8)]


def test_what_is_learned_of_each_expert_is_exact(tmp_path: Path):
    """Against the original with each ΔW added in float64, one by one."""
    trained = made(tmp_path, CONFIGS["qwen3_moe"])
    export_lora(trained.base, tmp_path / "lora", trained.adapter)
    assert relative_difference(served(trained, tmp_path / "lora"), expected_logits(trained)) < 1e-5


def test_an_expert_in_16_bits_gets_zeros(tmp_path: Path):
    storage = QosoraConfig(rank=8, modules_to_not_convert=[r"model\.layers\.1\.mlp\.experts\.2\.up_proj"])
    trained = made(tmp_path, CONFIGS["qwen3_moe"], storage)
    export_lora(trained.base, tmp_path / "lora", trained.adapter)
    assert relative_difference(served(trained, tmp_path / "lora"), expected_logits(trained)) < 1e-5


@pytest.mark.parametrize("targets", [None, ["gate_proj"], ["q_proj"]])
def test_dense_layers_that_peft_takes_for_experts(targets: Any, tmp_path: Path):
    """Without a single expert, as DeepSeek's first layers alone would be: by name, PEFT would leave them out."""
    original = make_checkpoint(tmp_path / "original", "qwen3_moe", mlp_only_layers=[0, 1])
    quantize(original, tmp_path / "base", QosoraConfig(rank=8))
    model = perturbed(load(tmp_path / "base"), target_modules=targets)
    model.save_pretrained(tmp_path / "adapter")
    trained = Trained(original, tmp_path / "base", tmp_path / "adapter", model)
    report = export_lora(trained.base, tmp_path / "lora", trained.adapter)
    assert report.adapted_layers == {None: 14, "gate_proj": 2, "q_proj": 2}[targets and targets[0]]
    expected = onto_original(trained, tmp_path / "merged")
    assert relative_difference(served(trained, tmp_path / "lora"), expected) < 1e-5


def test_a_rank_is_reduced_expert_by_expert(tmp_path: Path):
    trained = made(tmp_path, CONFIGS["gpt_oss"])
    whole = export_lora(trained.base, tmp_path / "whole", trained.adapter, rank=100)
    assert whole.rank_error == 0
    report = export_lora(trained.base, tmp_path / "lora", trained.adapter, rank=3, verify=True)
    assert 0 < report.rank_error < 1
    tensors = tensors_of(tmp_path / "lora", "adapter_model")
    assert tensors["base_model.model.model.layers.0.mlp.experts.lora_A.weight"].shape[0] == 4 * 3


def test_bf16_matrices(tmp_path: Path):
    trained = made(tmp_path, CONFIGS["llama4"])
    export_lora(trained.base, tmp_path / "lora", trained.adapter, dtype="bfloat16")
    assert {t.dtype for t in tensors_of(tmp_path / "lora", "adapter_model").values()} == {torch.bfloat16}

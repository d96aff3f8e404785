"""The names, shapes and ties of a model's tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DeepseekV3Config

from qosora.base.layout import PlainModel, natural_order


def test_the_plain_model_knows_what_stays_in_float32(tmp_path: Path):
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    groups = {"n_group": 2, "topk_group": 1}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2}
    DeepseekV3Config(**sizes, **experts, **groups, **attention, **heads).save_pretrained(tmp_path)
    plain = PlainModel(tmp_path, trust_remote_code=False)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert bias in plain.shapes
    assert plain.keeps_float32(bias, torch.bfloat16)
    assert not plain.keeps_float32(bias, torch.float32)
    assert not plain.keeps_float32("model.norm.weight", torch.bfloat16)
    # Experts: a layer each, although transformers stacks them.
    name, targets = plain.locate("model.layers.1.mlp.experts.3.up_proj.weight")
    assert targets == [name] == ["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert plain.shapes[name] == (24, 48)
    assert plain.missing(set(plain.shapes) - {bias}) == [bias]
    assert natural_order(["l.10.a", "l.2.b", "l.2.a"]) == ["l.2.a", "l.2.b", "l.10.a"]

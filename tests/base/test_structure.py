"""Which layers are decomposed, decided on the meta device by a model's class and the config."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from tiny import FAMILIES, LAYERS, MIXTURES, make_model
from torch import nn
from transformers import (
    ModernVBertConfig,
    ModernVBertForSequenceClassification,
    PreTrainedModel,
    ZambaConfig,
    ZambaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from qosora.base.structure import decompose_structure, replace_linears, skipped_modules
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import ConfigError
from qosora.layers import LinearExperts, qosora_modules


def on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return make_model(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_head_and_routers(family: str):
    model = on_meta(family)
    replaced = decompose_structure(model, QosoraConfig(rank=8))
    assert len(replaced) == LAYERS.get(family, 14)
    assert replaced == list(qosora_modules(model))
    left = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    assert all(name == "lm_head" or name.endswith((".gate", ".shared_expert_gate")) for name in left), left
    assert "lm_head" in left
    assert any(isinstance(module, LinearExperts) for module in model.modules()) == (family in MIXTURES)
    assert all(p.is_meta for p in model.parameters())


def test_shapes_ranks_and_dtypes_are_the_models_and_the_configs():
    for family, name, shape in (
        ("llama", "model.layers.0.mlp.up_proj", (56, 32)),
        ("gpt2", "transformer.h.0.mlp.c_fc", (128, 32)),
    ):
        model = on_meta(family).to(torch.bfloat16)
        config = QosoraConfig(rank=1000, rank_pattern={name: 5}, double_quant=False, compute_dtype="float16")
        decompose_structure(model, config)
        layer = model.get_submodule(name)
        assert (layer.out_features, layer.in_features) == shape
        assert layer.rank == 5
        assert layer.compute_dtype == torch.float16
        assert layer.fan_in_fan_out == (family == "gpt2")
        assert (layer.bias is not None) == (family == "gpt2")
        assert layer.weight_absmax.dtype == torch.float32
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_a_pattern_keeps_a_module_with_all_that_is_in_it():
    model = on_meta("llama")
    config = QosoraConfig(rank=8, modules_to_not_convert=["q_proj", "model.layers.1.mlp"])
    skip = skipped_modules(model, config)
    assert {"q_proj", "model.layers.1.mlp", "lm_head"} <= set(skip)
    assert len(replace_linears(model, config, skip)) == 14 - 2 - 3


def test_names_that_mean_no_layer_are_told_together_and_only_of_a_new_base():
    config = QosoraConfig(rank=8, rank_pattern={"down_porj": 4}, modules_to_not_convert=["c_attn"])
    with pytest.raises(ConfigError) as caught:
        decompose_structure(on_meta("llama"), config)
    assert len(caught.value.problems) == 2
    assert len(decompose_structure(on_meta("llama"), config, stored=True)) == 14


def test_nothing_left_is_refused():
    model = on_meta("llama")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no linear layer left to decompose"):
        replace_linears(model, QosoraConfig(), [".*proj", "lm_head"])
    assert not qosora_modules(model)


def test_experts_that_stay_whole_are_stacked_again():
    model = on_meta("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they were kept as asked: nothing to tell
        replaced = decompose_structure(model, QosoraConfig(rank=8, modules_to_not_convert=["experts"]))
    assert len(replaced) == 8
    assert not any(isinstance(module, LinearExperts) for module in model.modules())


def test_what_is_trained_with_a_head_of_its_name_stays():
    """ModernVBERT's tower has a `head`, too, and PEFT goes by the end of a name."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**vision, "vocab_size": 96, "pad_token_id": 0, "global_attn_every_n_layers": 1}
    config = ModernVBertConfig(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        model = ModernVBertForSequenceClassification(config)
    replaced = decompose_structure(model, QosoraConfig(rank=8))
    assert not [name for name in replaced if ".head." in name or name.startswith("head.")]
    assert {"model.vision_model.encoder.layers.0.mlp.fc1", "model.text_model.layers.0.mlp.Wi"} <= set(replaced)
    assert get_peft_model(model, OsoraConfig(task_type="SEQ_CLS", modules_to_save=["head", "classifier"]))


def test_layers_that_share_their_weights_stay_and_are_told(caplog: pytest.LogCaptureFixture):
    config = ZambaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        n_mamba_heads=2, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    )  # fmt: skip
    with torch.device("meta"):
        model = ZambaForCausalLM(config)
    caplog.set_level("INFO", "qosora")
    with pytest.warns(UserWarning, match="ZambaMambaMixer"):  # of which matrices are parameters of the mixer
        replaced = decompose_structure(model, QosoraConfig(rank=8))
    assert {name.rpartition(".")[2] for name in replaced} == {"in_proj", "out_proj", "linear"}
    (told,) = caplog.messages
    assert told.startswith("14 layers of ZambaForCausalLM stay in 16 bits, as other layers share their weights: ")
    assert all(kind in told for kind in ("self_attn.q_proj", "self_attn.o_proj", "feed_forward.down_proj"))
    assert "lm_head" not in told

"""The class of a checkpoint is the one that it names, so that no head of it is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DiffusionGemmaConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    InternLM3Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from qosora.base import load_base, quantize
from qosora.checkpoints import empty_model, model_class_of, require_language_model, sees
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError
from qosora.export import export_merged

GPT2: dict[str, Any] = {
    "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 90, "n_positions": 64, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(architectures=["GPT2ForSequenceClassification"]), GPT2ForSequenceClassification),
        (GPT2Config(architectures=["GPT2LMHeadModel"]), GPT2LMHeadModel),
        (T5Config(architectures=["T5ForConditionalGeneration"]), T5ForConditionalGeneration),
        (GPT2Config(architectures=None), AutoModelForCausalLM),
        (GPT2Config(architectures=[]), AutoModelForCausalLM),
        (GPT2Config(architectures=["RWForCausalLM"]), AutoModelForCausalLM),
        (GPT2Config(architectures=["LlamaForCausalLM"]), AutoModelForCausalLM),  # another configuration's
        (InternLM3Config(architectures=["LlamaForCausalLM"]), LlamaForCausalLM),  # which is its class
        (GPT2Config(architectures=["AutoModel"]), AutoModelForCausalLM),
        (GPT2Config(architectures=["GPT2Config"]), AutoModelForCausalLM),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value.architectures),
)
def test_the_class_that_is_named(config: Any, expected: type):
    assert model_class_of(config) is expected


def test_a_configuration_that_names_no_class_sees_nothing():
    assert not sees(GPT2Config(architectures=None))


def test_a_class_that_the_checkpoint_brings_is_found_only_when_that_may_run():
    config = LlamaConfig(architectures=["MyModel"])
    config.auto_map = {"AutoConfig": "config.MyConfig", "AutoModelForSeq2SeqLM": "model.MyModel"}
    assert model_class_of(config) is AutoModelForCausalLM
    assert model_class_of(config, trust_remote_code=True).__name__ == "AutoModelForSeq2SeqLM"


def test_an_empty_model_has_the_head_of_its_class():
    with torch.device("meta"):
        model = empty_model(GPT2Config(architectures=["GPT2ForSequenceClassification"], **GPT2), dtype=torch.bfloat16)
    assert isinstance(model, GPT2ForSequenceClassification)
    assert model.score.weight.shape == (3, 32)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "name", "passes"),
    [
        (GPT2Config, "GPT2LMHeadModel", True),
        (GPT2Config, "GPT2ForSequenceClassification", False),
        (GPT2Config, "GPT2Model", False),
        (DiffusionGemmaConfig, "DiffusionGemmaForBlockDiffusion", False),  # a block of tokens at once
    ],
)
def test_what_writes_text(kind: type[PreTrainedConfig], name: str, passes: bool):
    config = kind(architectures=[name])
    if passes:
        require_language_model(config, "folder", "qosora train")
        return
    with pytest.raises(CheckpointError, match=f"folder is a {name}, and qosora train takes language models"):
        require_language_model(config, "folder", "qosora train")


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | ({"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2)),
        lambda: BertForSequenceClassification(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=90,
                       num_labels=4)
        ),
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=16, num_layers=2, num_heads=2, d_ff=64, vocab_size=90)
        ),
    ],
    ids=["gpt2 classifier", "bert classifier", "t5"],
)  # fmt: skip
@torch.no_grad()
def test_other_models_are_converted_loaded_and_exported_whole(make: Any, tmp_path: Path):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "base", QosoraConfig(rank=16))
    base = load_base(tmp_path / "base").eval()
    assert type(base) is type(model)
    given = inputs(model)
    expected, got = model(**given).logits, base(**given).logits
    assert got.shape == expected.shape
    assert (got - expected).norm() < 0.35 * expected.norm()
    export_merged(tmp_path / "base", tmp_path / "plain", verify=True)
    again = type(model).from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(again(**given).logits, got, rtol=2e-2, atol=2e-2)


def test_a_tensor_without_a_place_stops_the_conversion(tmp_path: Path):
    model = GPT2ForSequenceClassification(GPT2Config(**GPT2))
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(file.read_text().replace("GPT2ForSequenceClassification", "GPT2LMHeadModel"))
    with pytest.raises(CheckpointError, match=r"1 tensors have no place in GPT2LMHeadModel, among them 'score.weight'"):
        quantize(tmp_path / "source", tmp_path / "base", QosoraConfig(rank=16))
    assert not (tmp_path / "base").exists()

"""What is relied on of transformers beside that names exist."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_checkpoint
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from qosora.compat import transformers as hidden


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = make_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_names_are_sorted_by_their_numbers():
    assert sorted(["a.10", "a.2"], key=hidden.dot_natural_key) == ["a.2", "a.10"]


def test_the_loader_marks_what_it_fills(checkpoint: Path):
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    assert all(map(hidden.was_loaded, model.parameters()))
    assert not hidden.was_loaded(nn.Parameter(torch.zeros(1)))


def test_the_loader_reads_float32_where_it_is_told_to(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {r"q_proj"})
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "q_proj" in name else torch.bfloat16), name
    assert list(hidden.float32_patterns(model, torch.bfloat16)) == ["q_proj"]
    assert list(hidden.float32_patterns(model, torch.float32)) == []
    hidden.read_in_float32(model, {"k_proj"})
    assert set(hidden.float32_patterns(model, torch.bfloat16)) == {"q_proj", "k_proj"}
    hidden.no_longer_in_float32(model, {"k_proj"})
    assert list(hidden.float32_patterns(model, torch.bfloat16)) == ["q_proj"]


def test_an_error_in_a_result_that_is_read_later_reaches_the_caller():
    def fail() -> dict[str, torch.Tensor]:
        raise ValueError("at once")

    result = hidden.Deferred(fail)  # made where the loader collects errors
    with pytest.raises(ValueError, match="at once"):
        result.items()
    assert dict(hidden.Deferred(lambda: {"a": torch.ones(1)}).items()) == {"a": torch.ones(1)}


def test_a_wrong_shape_ends_in_the_error_that_is_known(checkpoint: Path):
    config = AutoConfig.from_pretrained(checkpoint)
    config.intermediate_size *= 2
    with pytest.raises(RuntimeError) as caught:
        LlamaForCausalLM.from_pretrained(checkpoint, config=config)
    assert hidden.says_other_shapes(caught.value)
    assert not hidden.says_other_shapes(RuntimeError("another"))


def test_what_no_quantizer_converts():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8))
    skip = hidden.modules_to_skip(model, ["k_proj"])
    assert {"lm_head", "k_proj"} <= set(skip)
    assert not hidden.should_convert_module("lm_head", skip)
    assert not hidden.should_convert_module("model.layers.0.self_attn.k_proj", skip)
    assert hidden.should_convert_module("model.layers.0.self_attn.q_proj", skip)
    assert hidden.get_module_from_name(model, "lm_head.weight") == (model.lm_head, "weight")
    assert hidden.tied_weights(model) == {}
    assert list(hidden.optional_tensors(model)) == []


def test_names_go_to_disk_and_back(mixtral: PreTrainedModel):
    transforms = hidden.get_model_conversion_mapping(mixtral, add_legacy=False)
    stackers = list(filter(hidden.stacks_experts, transforms))
    assert all(isinstance(t, hidden.WeightTransform) for t in transforms)
    assert all(isinstance(t, hidden.WeightConverter) for t in stackers)
    assert all(map(hidden.only_stacks, stackers))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    (stacker,) = (s for s in stackers if hidden.makes(s, name))
    assert not hidden.makes(stacker, "model.layers.0.self_attn.q_proj.weight")
    on_disk = hidden.names_on_disk(stacker, name, mixtral.get_parameter(name), mixtral)
    count = mixtral.config.num_local_experts
    assert len(on_disk) == 2 * count
    reverted = hidden.revert_weight_conversion(mixtral, {name: mixtral.get_parameter(name)})
    assert {key.split(".")[-2] for key in reverted} == {"w1", "w3"}
    renamings = [t for t in transforms if isinstance(t, hidden.WeightRenaming)]
    for key in reverted:
        found, pattern = hidden.rename_source_key(
            key, renamings, stackers, mixtral.base_model_prefix, mixtral.state_dict()
        )
        assert found == name
        assert name.endswith(hidden.target_patterns(stackers, pattern)[0].lstrip("."))


def test_a_converter_of_one_tensor():
    class Twice:
        @staticmethod
        def convert(
            tensors: dict[str, torch.Tensor], target_patterns: list[str], **_: object
        ) -> dict[str, torch.Tensor]:
            return {target_patterns[0]: tensors["a"] * 2}

    converters = [SimpleNamespace(source_patterns=["a"], target_patterns=["b"], operations=[Twice])]
    assert hidden.converted(converters, "a", torch.ones(1), "x.b") == 2


def test_plain_experts(mixtral: PreTrainedModel):
    experts = mixtral.get_submodule("model.layers.0.mlp.experts")
    assert hidden.are_plain_experts(experts)
    assert hidden.has_gate(experts)
    assert hidden.own_gate(experts) is None
    assert not hidden.are_plain_experts(nn.Linear(2, 2))
    for option in ("is_transposed", "has_bias", "has_post_expert_norm"):
        other = copy.copy(experts)
        setattr(other, option, True)
        assert not hidden.are_plain_experts(other), option

    class Own(type(experts)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return gate_up + 1

    other = copy.copy(experts)
    other.__class__ = Own
    gate = hidden.own_gate(other)
    assert gate is not None
    assert gate(torch.zeros(1)) == 1


def test_the_usual_gate_is_the_product_with_the_activation():
    from transformers.integrations.moe import _default_apply_gate

    gate, up = torch.randn(2, 3, 4)
    usual = _default_apply_gate(SimpleNamespace(act_fn=torch.sigmoid), torch.cat([gate, up], -1))
    torch.testing.assert_close(usual, torch.sigmoid(gate) * up)


def test_conversions_to_revert_are_added_to_those_of_the_loader():
    model = SimpleNamespace(_weight_conversions=[1])
    hidden.add_conversions(model, [2])
    assert model._weight_conversions == [1, 2]
    made = SimpleNamespace()
    hidden.add_conversions(made, [2])
    assert vars(made) == {}


def test_gguf_names_and_values():
    pytest.importorskip("gguf")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=8))
    kind = hidden.TENSOR_PROCESSORS.get("llama", hidden.TensorProcessor)
    processor = kind(config={"num_attention_heads": 2, "num_key_value_heads": 2})
    found = hidden.gguf_names(model, processor)
    assert found["blk.1.attn_q.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert found["output.weight"] == "lm_head.weight"
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert np.array_equal(hidden.gguf_values(processor, "blk.1.ffn_up.weight", values, found), values)
    permuted = hidden.gguf_values(processor, "blk.1.attn_q.weight", values, found)
    assert sorted(permuted.ravel()) == sorted(values.ravel())
    assert not np.array_equal(permuted, values)
    for architecture in sorted(hidden.GGUF_ARCHS)[:1]:
        assert hidden.get_gguf_conversion_mapping(architecture, model.config)


def test_the_attention_that_a_model_was_built_with():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8),
            attn_implementation="eager",
        )
    assert hidden.attention_of(model.config) == "eager"


def test_trainer_sees_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    arguments._n_gpu = 4
    assert arguments.n_gpu == 4
    hidden.use_one_gpu(arguments)
    assert arguments.n_gpu == 1


def test_the_remark_on_mtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.trainer_utils import sort_checkpoints

    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    said: list[str] = []
    logger = logging.getLogger(hidden.TRAINER_LOGGER)
    monkeypatch.setattr(logger, "warning", lambda message, *args, **kwargs: said.append(message))
    sort_checkpoints(str(tmp_path), use_mtime=True)
    assert any(map(hidden.is_of_mtime, said)) or not said  # it is said once in a process
    assert not hidden.is_of_mtime("something else")


def test_old_names_warn_in_the_words_that_are_held_back(checkpoint: Path):
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    for call in (model.gradient_checkpointing_enable, lambda: model.is_gradient_checkpointing):
        with pytest.warns(FutureWarning, match=hidden.old_names_warning()):
            call()

"""Experts of one tensor: taken apart and put together, they compute the same; decomposed, saved, trained, exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from tiny import assert_same_tensors, logits, token_ids, train
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    PreTrainedConfig,
)

from qosora.base import load_base, quantize
from qosora.checkpoints import read_json
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import CheckpointError
from qosora.export import export_lora, export_merged
from qosora.layers import (
    QosoraLinear,
    first_format,
    layer_of_stack,
    parts_on_disk,
    put_together,
    qosora_modules,
    stacked_place,
    take_apart,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, PreTrainedConfig] = {
    "gpt_oss": GptOssConfig(**SIZES),
    "llama4": Llama4TextConfig(**SIZES, intermediate_size_mlp=56),
    "jetmoe": JetMoeConfig(**{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_attention_heads")},
                           kv_channels=16),
    "dbrx": DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=96, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 40, "moe_num_experts": 4, "hidden_size": 32},
    ),
    "longcat": LongcatFlashConfig(
        **{k: v for k, v in SIZES.items() if "experts" not in k and k not in ("head_dim", "num_key_value_heads")},
        ffn_hidden_size=48, expert_ffn_hidden_size=24, num_key_value_heads=4, n_routed_experts=4, zero_expert_num=2,
        moe_topk=2, num_layers=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        head_dim=8,
    ),
}  # fmt: skip
#: What an older qosora cannot take apart.
NEW = ("dbrx", "longcat")


def source_of(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


class Stacks(nn.Module):
    """Uses of stacks, and of what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.whole = (nn.Parameter(torch.randn(3, 4, 4)) for _ in range(3))
        self.turned, self.both, self.cast = (nn.Parameter(torch.randn(3, 4, 4)) for _ in range(3))
        self.summed, self.sliced, self.split = (nn.Parameter(torch.randn(3, 4, 4)) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(self.whole.shape[0], -1, self.whole.size(1))
        y = torch.bmm(x.to(self.rows.device), self.whole)
        parts = [F.linear(y[i] @ self.columns[i], self.rows[i], self.bias[i]) for i in range(3)]
        z = torch.bmm(torch.stack(parts) @ self.turned[0].T, self.both.transpose(1, 2))
        z = F.linear(z, self.cast[2].float()) @ self.cast[1].to(z.dtype).mT
        return z + self.summed.sum() + x[:1] @ self.sliced[:2][0] + x[:1] @ self.split[0][1:2].T


@torch.no_grad()
def test_uses_are_told_apart_and_compute_the_same():
    torch.manual_seed(0)
    module = Stacks()
    x, state = torch.randn(6, 4), {k: v.clone() for k, v in module.state_dict().items()}
    expected = module(x)
    wrapped = nn.ModuleDict({"inner": module})
    first, more = ["rows", "columns", "whole"], ["turned", "both", "cast"]
    assert take_apart(nn.ModuleDict({"inner": Stacks()}), version=3).keys() == {f"inner.{name}" for name in first}
    taken = take_apart(wrapped)
    assert {name: stack.columns for name, stack in taken.items()} == {
        "inner.rows": False, "inner.columns": True, "inner.whole": True, "inner.turned": False, "inner.both": False,
        "inner.cast": False,
    }  # fmt: skip
    assert take_apart(wrapped) == {}
    assert first_format(wrapped) == 6
    assert set(dict(module.named_parameters(recurse=False))) == {"summed", "sliced", "split", "bias"}
    for name in (*first, *more):
        for i in range(3):
            layer: Any = module.get_submodule(f"{i}.{name}")
            assert layer.weight.device.type == "meta"
            layer.weight = nn.Parameter(state[name][i].clone())
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected)
    with pytest.raises(TypeError, match="only their products are known"):
        torch.add(x, module.rows)
    with pytest.raises(TypeError, match="only their products"):  # of the other way round
        torch.matmul(x, module.rows[0])
    put_together(wrapped)
    assert type(module) is Stacks
    assert_same_tensors(dict(sorted(module.state_dict().items())), dict(sorted(state.items())))
    assert torch.equal(module(x), expected)


def test_what_the_loader_makes_of_several_tensors_stays():
    made = take_apart(nn.ModuleDict({"inner": Stacks()}), lambda name: None if name == "inner.rows" else ())
    assert "inner.rows" not in made
    assert "inner.whole" in made
    parts = take_apart(nn.ModuleDict({"inner": Stacks()}), lambda name: ("a", "b"))
    assert "inner.columns" not in parts  # whose halves are halves of what a layer takes, not of what it gives
    assert parts["inner.rows"].parts == ("a", "b")


def test_stacks_that_modules_share_stay():
    """As DiffusionGemma's encoder and decoder do: what a layer is stored in has no such tie."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS["gpt_oss"]))
    first, second = (f"model.layers.{k}.mlp.experts.gate_up_proj" for k in range(2))
    assert {first, second} <= take_apart(copy.deepcopy(model), parts_on_disk(model)).keys()
    model.all_tied_weights_keys = {second: first}
    taken = take_apart(model, parts_on_disk(model))
    assert taken.keys() == {f"model.layers.{k}.mlp.experts.down_proj" for k in range(2)}


def test_stand_ins_refuse_what_layers_do_not_compute():
    module: Any = Stacks()
    take_apart(nn.ModuleDict({"inner": module}))
    assert module.both.transpose(-1, 1).shape == module.both.mT.shape == (3, 4, 4)
    assert module.both[0].transpose(0, 0) is not None
    for wrong in (lambda: module.both.transpose(0, 1), lambda: module.both.view(-1, 2, 8), lambda: module.both + 1):
        with pytest.raises(TypeError, match=r"decomposed one by one|unsupported operand"):
            wrong()


@pytest.mark.parametrize("parameter", ["a.experts.gate_up_proj", "a.layers.3.input_linear.weight"])
def test_names(parameter: str):
    assert stacked_place(layer_of_stack(parameter, 12)) == (parameter, 12)
    assert stacked_place("a.mlp.up_proj") is None


@pytest.mark.parametrize("kind", MODELS)
def test_a_base_of_such_a_model(kind: str, tmp_path: Path):
    source = source_of(kind, tmp_path / "source")
    config = QosoraConfig(rank=8)
    quantize(source, tmp_path / "base", config)
    assert read_json(tmp_path / "base" / "config.json")["quantization_config"]["format_version"] == (
        6 if kind in NEW else 3
    )
    assert config.to_dict()["format_version"] == 2  # what is made of a user's config is not the user's
    base = load_base(tmp_path / "base")
    at_once = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert_same_tensors(base.state_dict(), at_once.state_dict())
    assert torch.equal(logits(base), logits(at_once))
    experts = [n for n, p in load_base(tmp_path / "base").named_parameters() if p.ndim > 2]
    assert not experts
    at_once.save_pretrained(tmp_path / "again")
    assert_same_tensors(load_base(tmp_path / "again").state_dict(), base.state_dict())
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert float((logits(base) - logits(plain)).norm() / logits(plain).norm()) < 0.5
    whole = at_once.dequantize()
    assert whole.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(whole), logits(base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_trained_and_exported(kind: str, tmp_path: Path):
    quantize(source_of(kind, tmp_path / "source"), tmp_path / "base", QosoraConfig(rank=8))
    model = get_peft_model(load_base(tmp_path / "base"), OsoraConfig())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_base(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    for onto in ("dequantized", "original"):
        export_merged(
            tmp_path / "base", tmp_path / onto, tmp_path / "adapter", dtype="float32", onto=onto, verify=True,
            original=tmp_path / "source" if onto == "original" else None,
        )  # fmt: skip
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / onto)
        stored = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
        assert {k: v.shape for k, v in plain.state_dict().items()} == {
            k: v.shape for k, v in stored.state_dict().items()
        }


def test_experts_that_are_to_stay(tmp_path: Path):
    source = source_of("gpt_oss", tmp_path / "source")
    quantize(source, tmp_path / "base", QosoraConfig(rank=8, modules_to_not_convert=["down_proj"]))
    base = load_base(tmp_path / "base")
    assert not any(name.endswith("down_proj") for name in qosora_modules(base))
    assert isinstance(base.get_submodule("model.layers.0.mlp.experts.0.gate_up_proj"), QosoraLinear)
    export_merged(tmp_path / "base", tmp_path / "plain", dtype="float32", verify=True)
    key = "model.layers.1.mlp.experts.down_proj"
    kept, original = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f).get_parameter(key) for f in ("plain", "source")
    )
    assert torch.equal(kept, original)


@pytest.mark.parametrize("kind", ["gpt_oss", "dbrx", "longcat"])
def test_a_calibrated_scale(kind: str, tmp_path: Path):
    rows = [row.tolist() for row in token_ids(8)]
    config = QosoraConfig(rank=8, scale="calibrated", calibration=rows)
    quantize(source_of(kind, tmp_path / "source"), tmp_path / "base", config)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    assert_same_tensors(made.state_dict(), load_base(tmp_path / "base").state_dict())


def test_no_lora_holds_experts_that_the_model_reads_before_their_module_runs(tmp_path: Path):
    source = source_of("dbrx", tmp_path / "source")
    quantize(source, tmp_path / "base", QosoraConfig(rank=8))
    model = get_peft_model(load_base(tmp_path / "base"), OsoraConfig())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"reads transformer.blocks.0.ffn.experts.mlp.\w\w before.*merged"):
        export_lora(tmp_path / "base", tmp_path / "lora", tmp_path / "adapter", original=source)
    assert not (tmp_path / "lora").exists()

"""Experts become layers of their own, compute what transformers' stacked ones do, and are named as on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from linear_checks import grad
from peft import PeftModel, get_peft_model
from tiny import (
    MIXTURES,
    assert_same_tensors,
    decompose,
    load,
    logits,
    make_base,
    make_checkpoint,
    relative_difference,
    rounding,
    token_ids,
    train,
)
from torch import nn
from torch.func import functional_call
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    BeamConfig,
    DbrxConfig,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MiniMaxM2Config,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

from qosora.adapter import OsoraLayer
from qosora.checkpoints.reader import CheckpointReader
from qosora.config import OsoraConfig, QosoraConfig
from qosora.decompose import nf4
from qosora.errors import CheckpointError
from qosora.export import export_merged
from qosora.layers import stacks
from qosora.layers.experts import LinearExperts, router_names, split_experts, stack_experts, stacked_names
from qosora.layers.linear import QosoraLinear, qosora_modules

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
_MOE = {**_SIZES, "num_experts": 4, "moe_intermediate_size": 24}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_ATTENTION = {"layer_types": ["full_attention"] * 2}

#: Models whose experts differ: names on disk, gates, routers, which layers have them.
SPLIT: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4),
    "minimax_m2": MiniMaxM2Config(**_SIZES, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**_MOE, shared_expert_intermediate_size=40),
    "a shared expert as wide as there are experts": Qwen3NextConfig(
        **_MOE, **_ATTENTION, shared_expert_intermediate_size=4
    ),
    "deepseek_v3": DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4}, **_LATENT, n_routed_experts=4, moe_intermediate_size=24, n_group=2,
        topk_group=1, first_k_dense_replace=1,
    ),
    "a gate in float32": BeamConfig(**_MOE, mlp_layer_types=["dense", "sparse"]),
    "no gate": NemotronHConfig(
        **_SIZES, n_routed_experts=4, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24,
        layers_block_type=["attention", "moe"], n_groups=1, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8,
    ),
    "a linear router": AfmoeConfig(**_MOE, num_dense_layers=1),
}  # fmt: skip
#: Experts that are biased and interleaved; that are transposed; that are stacked in two dimensions.
LEFT: dict[str, PreTrainedConfig] = {
    "gpt_oss": GptOssConfig(**_SIZES, **_ATTENTION, num_local_experts=4),
    "llama4": Llama4TextConfig(**_SIZES, num_local_experts=4, intermediate_size_mlp=56),
    "dbrx": DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=96,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 56, "moe_num_experts": 4, "hidden_size": 32},
    ),
}  # fmt: skip


def build(config: PreTrainedConfig, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model


def split_copy(model: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """A copy of a model on the meta device, whose split experts have the original's weights; and their names."""
    copy = build(model.config, "meta")
    names = split_experts(copy)
    for name in names:
        experts = copy.get_submodule(name)
        assert isinstance(experts, LinearExperts)
        for parameter, parts in experts.projections.items():
            for part, stack in zip(parts, model.get_parameter(f"{name}.{parameter}").chunk(len(parts), 1), strict=True):
                for index, weight in enumerate(stack):
                    experts.get_submodule(f"{index}.{part}").weight = nn.Parameter(weight.detach().clone())
    return copy, names


def plain_weights(weight_of: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of decomposed layers, as the parameters of transformers' own model that they belong to."""
    params = {f"{name}.weight": weight for name, weight in weight_of.items()}
    for name, experts in model.named_modules():
        if isinstance(experts, LinearExperts):
            for parameter, parts in experts.projections.items():
                stacks = [
                    torch.stack([params.pop(f"{name}.{i}.{part}.weight") for i in range(experts.num_experts)])
                    for part in parts
                ]
                params[f"{name}.{parameter}"] = torch.cat(stacks, 1)
    return params


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.tensor(name) for name in reader.names()}


class TestSplit:
    @pytest.mark.parametrize("config", SPLIT.values(), ids=SPLIT.keys())
    def test_computes_what_the_stacked_experts_do(self, config: PreTrainedConfig):
        model = build(config)
        copy, names = split_copy(model)
        assert names
        assert not stacked_names(copy)
        generator = torch.Generator().manual_seed(0)
        for name in names:
            x = torch.randn(11, 32, generator=generator)
            # expert 1 gets no token
            index = torch.stack([torch.tensor([0, 2, 3])[torch.randperm(3, generator=generator)[:2]] for _ in x])
            weights = torch.rand(11, 2, generator=generator)
            expected, got = (m.get_submodule(name)(x, index, weights).detach() for m in (model, copy))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))

    @pytest.mark.parametrize("config", SPLIT.values(), ids=SPLIT.keys())
    def test_names_are_those_on_disk(self, config: PreTrainedConfig, tmp_path: Path):
        model = build(config)
        model.save_pretrained(tmp_path)
        copy, names = split_copy(model)
        on_disk = {name.replace("block_sparse_moe", "mlp").replace("backbone.", "model.") for name in tensors(tmp_path)}
        split = {f"{name}.{key}" for name in names for key in copy.get_submodule(name).state_dict()}
        assert split <= on_disk
        assert {name for name in on_disk if ".experts." in name} == split

    @pytest.mark.parametrize("config", SPLIT.values(), ids=SPLIT.keys())
    def test_is_undone_by_stacking(self, config: PreTrainedConfig):
        model = build(config)
        copy, names = split_copy(model)
        assert split_experts(copy) == [], "split already"
        stack_experts(copy)
        for name in names:
            assert type(copy.get_submodule(name)) is type(model.get_submodule(name))
            assert_same_tensors(copy.get_submodule(name).state_dict(), model.get_submodule(name).state_dict())

    @pytest.mark.parametrize("config", LEFT.values(), ids=LEFT.keys())
    def test_leaves_others_alone(self, config: PreTrainedConfig):
        model = build(config, "meta")
        before = model.state_dict().keys()
        assert split_experts(model) == []
        assert model.state_dict().keys() == before
        assert len(stacked_names(model)) == 2

    def test_routers_are_found(self):
        found = {kind: router_names(build(config, "meta")) for kind, config in {**SPLIT, **LEFT}.items()}
        layers = [f"model.layers.{i}" for i in (0, 1)]
        assert {kind: names for kind, names in found.items() if names} == {
            "qwen2_moe": {f"{layer}.mlp.shared_expert_gate" for layer in layers},
            "a shared expert as wide as there are experts": {f"{layer}.mlp.shared_expert_gate" for layer in layers},
            "a linear router": {"model.layers.1.mlp.router.gate"},
            "llama4": {f"{layer}.feed_forward.router" for layer in layers},
            "dbrx": {f"transformer.blocks.{i}.ffn.router.layer" for i in (0, 1)},
        }


@pytest.mark.parametrize("family", MIXTURES)
class TestDecomposed:
    def test_logits_and_gradients_against_autograd_in_float64(self, family: str, tmp_path: Path):
        plain = load(make_checkpoint(tmp_path, family), experts_implementation="eager").double()
        model = get_peft_model(decompose(tmp_path), OsoraConfig())
        train(model, steps=1)  # away from s = σ and o = 1
        layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, OsoraLayer)}
        vectors = {n: [v.detach().double().requires_grad_() for v in m.vectors("default")] for n, m in layers.items()}
        weights = {}
        for name, (s, o) in vectors.items():
            factors = layers[name].base_layer.factors
            R, U, V = (nf4.dequantize(part).double() for part in (factors.residual, factors.U, factors.V))
            assert factors.scale is not None
            weights[name] = (R + (U.T * o[:, None] * s) @ V) * factors.scale.double()
        inputs = {"input_ids": token_ids(), "labels": token_ids()}
        expected = functional_call(plain, plain_weights(weights, model.base_model.model), kwargs=inputs)
        got = model(**inputs)
        assert relative_difference(got.logits, expected.logits) < rounding(torch.float32)

        expected.loss.backward()
        got.loss.backward()
        for name, layer in layers.items():
            for kind, leaf in zip("so", vectors[name], strict=True):
                found = getattr(layer, f"osora_{kind}")["default"].grad
                if found is None:  # an expert that no token chose
                    assert ".experts." in name
                    assert not grad(leaf).any()
                else:
                    scale = float(grad(leaf).abs().max())
                    torch.testing.assert_close(found.double(), grad(leaf), rtol=1e-4, atol=1e-4 * scale)
        chosen = [".experts." in n and m.osora_s["default"].grad is not None for n, m in layers.items()]
        assert sum(chosen) > 6

    def test_gradient_checkpointing_and_autocast(self, family: str, tmp_path: Path):
        model = get_peft_model(decompose(make_checkpoint(tmp_path, family)), OsoraConfig()).train()
        losses, grads = [], []
        for checkpointing in (False, True):
            if checkpointing:
                model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=token_ids(), labels=token_ids()).loss
            loss.backward()
            losses.append(loss)
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert torch.equal(*losses)
        assert_same_tensors(grads[1], grads[0])
        assert {grad.dtype for grad in grads[0].values()} == {torch.float32}
        exact = model(input_ids=token_ids(), labels=token_ids()).loss
        torch.testing.assert_close(losses[0].float(), exact, rtol=0.02, atol=0)

    def test_adapter_and_export(self, family: str, tmp_path: Path):
        base = make_base(tmp_path / "base", family)
        model = get_peft_model(load(base), OsoraConfig())
        start = logits(model)
        train(model)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))
        assert not torch.equal(logits(again), start)

        export_merged(base, tmp_path / "plain", tmp_path / "adapter")
        assert tensors(tmp_path / "plain").keys() == tensors(tmp_path / "base-source").keys()
        plain = load(tmp_path / "plain")
        assert not qosora_modules(plain)
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
        merged = model.merge_and_unload().dequantize()
        assert_same_tensors(merged.state_dict(), plain.state_dict())

    def test_routers_stay(self, family: str, tmp_path: Path):
        source = make_checkpoint(tmp_path, family)
        model, plain = decompose(source), load(source)
        kept = {name: p for name, p in model.named_parameters() if "gate." in name}
        assert len(kept) == {"qwen3_moe": 1, "qwen2_moe": 4}.get(family, 2)
        for name, param in kept.items():
            assert torch.equal(param, plain.get_parameter(name)), name

    def test_skipped_experts_stay_stacked(self, family: str, tmp_path: Path):
        source = make_checkpoint(tmp_path / "source", family)
        model = decompose(source, QosoraConfig(rank=8, modules_to_not_convert=["experts"]))
        assert not any(isinstance(module, LinearExperts) for module in model.modules())
        model.save_pretrained(tmp_path / "base")
        again = load(tmp_path / "base")
        assert_same_tensors(again.state_dict(), model.state_dict())
        assert torch.equal(logits(again), logits(model))
        before, after = tensors(source), tensors(tmp_path / "base")
        kept = {name for name in before if ".experts." in name}
        assert kept
        assert_same_tensors({n: after[n] for n in kept}, {n: before[n] for n in kept})


class TestOptions:
    def test_patterns_name_experts(self, tmp_path: Path):
        """A projection of all experts, an expert, the experts of a layer."""
        skip = ["w2", "experts.3", "model.layers.0.mlp.experts"]
        config = QosoraConfig(rank=8, rank_pattern={"w1": 3, "experts.2.w1": 5}, modules_to_not_convert=skip)
        source = make_checkpoint(tmp_path / "source", "mixtral")
        model = decompose(source, config, dtype=torch.bfloat16)
        ranks = {n: m.rank for n, m in qosora_modules(model).items() if ".experts." in n}
        names = "model.layers.1.mlp.experts"
        assert ranks == {
            f"{names}.{i}.{w}": {"w1": 5 if i == 2 else 3, "w3": 8}[w] for i in range(3) for w in ("w1", "w3")
        }
        left = {n: m for n, m in model.named_modules() if ".experts." in n and type(m) is nn.Linear}
        assert len(left) == 12 + 4 + 2
        assert {m.weight.dtype for m in left.values()} == {torch.bfloat16}
        model.save_pretrained(tmp_path / "base")
        again = load(tmp_path / "base")
        assert_same_tensors(again.state_dict(), model.state_dict())
        plain = model.dequantize()
        assert plain.state_dict().keys() == load(source).state_dict().keys()
        assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}

    def test_what_is_decomposed_is_read_in_float32(self, tmp_path: Path):
        config = QosoraConfig(rank=8, modules_to_not_convert=["model.layers.0.mlp.experts.1"])
        source = make_checkpoint(tmp_path, "mixtral")
        exact, model = decompose(source, config), decompose(source, config, dtype=torch.bfloat16)
        for name, layer in qosora_modules(model).items():
            assert_same_tensors(layer.state_dict(), exact.get_submodule(name).state_dict())
        assert model.get_submodule("model.layers.0.mlp.experts.1.w1").weight.dtype == torch.bfloat16

    def test_adapters_of_some_experts(self, tmp_path: Path):
        base = load(make_base(tmp_path / "base", "mixtral"))
        model = get_peft_model(base, OsoraConfig(layers_to_transform=[1]))
        adapted = [n for n, m in model.named_modules() if isinstance(m, OsoraLayer)]
        assert len(adapted) == 16
        assert all("layers.1." in name for name in adapted)
        train(model)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))


class TestRefuses:
    def test_experts_that_stay_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(stacks, "_FLAT", {})
        model = build(LEFT["dbrx"])
        with torch.no_grad():  # some are left uninitialised
            for param in model.parameters():
                param.normal_(std=0.1)
        model.save_pretrained(tmp_path / "source")
        with pytest.warns(UserWarning, match=r"2 modules of .*ForCausalLM .*\.0\..*\.experts.mlp'.* stay in 16 bits"):
            decomposed = decompose(tmp_path / "source")
        assert any(isinstance(module, QosoraLinear) for module in decomposed.modules())
        decomposed.save_pretrained(tmp_path / "base")
        again = load(tmp_path / "base")  # a base does not say it again
        assert_same_tensors(again.state_dict(), decomposed.state_dict())
        assert torch.equal(logits(again), logits(decomposed))

    def test_a_checkpoint_with_stacks(self, tmp_path: Path):
        load(make_checkpoint(tmp_path / "source", "mixtral")).save_pretrained(
            tmp_path / "stacked", save_original_format=False
        )
        with pytest.raises(CheckpointError, match=r"experts of a layer in one tensor.*modules_to_not_convert"):
            decompose(tmp_path / "stacked")
        kept = QosoraConfig(rank=8, modules_to_not_convert=["experts"])
        assert_same_tensors(
            decompose(tmp_path / "stacked", kept).state_dict(), decompose(tmp_path / "source", kept).state_dict()
        )

"""A matrix that is trained beside the vectors: right everywhere that an adapter goes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import edit_tensors, refused, tensors_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import load, logits, make_base, make_checkpoint, make_trained, perturbed, sums, token_ids, write_jsonl
from transformers import AutoModelForCausalLM, LlamaConfig

from qosora.adapter import OsoraLayer
from qosora.base import load_model
from qosora.base.describe import describe
from qosora.cli import main
from qosora.config import OsoraConfig, QosoraConfig
from qosora.decompose import nf4
from qosora.errors import CheckpointError, ConfigError
from qosora.export import export_lora, export_merged
from qosora.memory.options import Batch, StepOptions
from qosora.memory.predict import TracedModel
from qosora.memory.profile import profile
from qosora.training import create_optimizer, train
from qosora.training.config import TrainConfig

CONFIG: dict[str, Any] = {"update_rank": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("update") / "llama", config=QosoraConfig(rank=8, scale="columns"))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def layers(model: torch.nn.Module) -> dict[str, OsoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OsoraLayer)}


def test_it_starts_where_the_base_is(base: Path):
    model = load(base)
    expected = logits(copy.deepcopy(model))
    adapted = get_peft_model(model, OsoraConfig(**CONFIG))
    assert torch.equal(logits(adapted), expected)
    for layer in layers(adapted).values():
        B, A = layer.osora_B["default"], layer.osora_A["default"]
        assert (A.shape, B.shape) == ((2, layer.in_features), (layer.out_features, 2))
        assert A.dtype == B.dtype == torch.float32
        assert A.std() > 0
        assert not B.any()


@torch.no_grad()
def test_output_and_gradients_against_float64(base: Path):
    model = perturbed(load(base), **CONFIG)
    for name, layer in list(layers(model).items())[:7]:
        s, o = layer.vectors("default")
        update = layer.update("default")
        assert update is not None, name
        own = layer.base_layer
        R, U, V = (nf4.dequantize(getattr(own.factors, part)).double() for part in ("residual", "U", "V"))
        leaves = [t.detach().double().requires_grad_() for t in (s, o, *update)]
        x = torch.randn(3, 5, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        g = torch.randn(3, 5, layer.out_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.enable_grad():
            wide = x.clone().requires_grad_()
            s64, o64, B, A = leaves
            scaled = wide if own.c is None else wide * own.c.double()
            expected = scaled @ R.T + (scaled @ V.T * s64) @ U * o64 + wide @ A.T @ B.T
            expected.backward(g)
            narrow = x.float().requires_grad_()
            got = layer(narrow)
            got.backward(g.float())
        trained = [layer.osora_s, layer.osora_o, layer.osora_B, layer.osora_A]
        assert relative_difference(got.double(), expected) < 1e-5, name
        assert narrow.grad is not None
        assert relative_difference(narrow.grad.double(), wide.grad) < 1e-5, name  # type: ignore[arg-type]
        for parameters, leaf in zip(trained, leaves, strict=True):
            assert relative_difference(parameters["default"].grad.double(), leaf.grad) < 1e-5, name  # type: ignore[arg-type]


def test_in_16_bits_and_under_autocast_it_is_near(base: Path):
    model = perturbed(load(base), **CONFIG)
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_difference(logits(model).float(), expected) < 0.05
    model.to(torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "osora_" in name} == {torch.float32}
    assert relative_difference(logits(model).float(), expected) < 0.05


def test_saved_and_loaded(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = perturbed(load(base), **CONFIG)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"osora_s", "osora_o", "osora_A", "osora_B"}
    assert torch.equal(logits(load_model(tmp_path / "adapter", base=base)), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter")), logits(model))
    said = describe(tmp_path / "adapter")
    assert said["update_rank"] == 2
    assert said["adapter_parameters"] == sum(t.numel() for t in stored.values())
    assert said["other_parameters"] == 0
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "s and o, and an update of rank 2, of 14 layers" in capsys.readouterr().out


def test_several_adapters_take_turns(base: Path, tmp_path: Path):
    one, other = (perturbed(load(base), seed=i, **config) for i, config in ((1, CONFIG), (2, {})))
    expected = [logits(model) for model in (one, other)]
    for name, model in (("one", one), ("other", other)):
        model.save_pretrained(tmp_path / name)
    both = PeftModel.from_pretrained(load(base), tmp_path / "one", "one")
    both.load_adapter(tmp_path / "other", "other")
    for name, wanted in zip(("one", "other", "one"), (*expected, expected[0]), strict=True):
        both.set_adapter(name)
        assert torch.equal(logits(both), wanted)
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(load(base)))


def test_it_is_not_merged_into_4_bits(base: Path):
    model = perturbed(load(base), **CONFIG)
    expected = logits(model)
    with pytest.raises(ConfigError, match="an update of rank 2, which a base in 4 bits cannot take up: write merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)


def test_what_it_adds(base: Path):
    model = perturbed(load(base), **CONFIG)
    layer = next(iter(layers(model).values()))
    x = torch.eye(layer.in_features)
    with torch.no_grad():
        added = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(layer.get_delta_weight("default"), added.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_exports_are_the_adapted_model(family: str, tmp_path: Path):
    trained = make_trained(tmp_path, family, **CONFIG)
    expected = logits(trained.model)
    report = export_merged(trained.base, tmp_path / "merged", trained.adapter, dtype="float32", verify=True)
    assert report.verification is not None
    assert relative_difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) < 1e-4
    export_merged(trained.base, tmp_path / "onto", trained.adapter, onto="original", dtype="float32", verify=True)
    onto = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "onto"))
    lora = export_lora(trained.base, tmp_path / "lora", trained.adapter, dtype="float32", verify=True)
    assert lora.rank == 10
    original = AutoModelForCausalLM.from_pretrained(trained.original)
    assert relative_difference(logits(PeftModel.from_pretrained(original, tmp_path / "lora")), onto) < 1e-4


def test_a_reduced_lora(tmp_path: Path):
    trained = make_trained(tmp_path, "llama", **CONFIG)
    report = export_lora(trained.base, tmp_path / "lora", trained.adapter, rank=9, dtype="float32", verify=True)
    assert report.rank == 9
    assert 0 < report.rank_error < 0.5
    assert {min(t.shape) for t in tensors_of(tmp_path / "lora", "adapter_model").values()} == {9}


def test_a_combination(tmp_path: Path):
    trained = make_trained(tmp_path, "llama", **CONFIG)
    plain, more = (perturbed(load(trained.base), seed=i, **c) for i, c in ((4, {}), (5, {"update_rank": 3})))
    weights = {trained.adapter: 0.7, tmp_path / "plain": -0.2, tmp_path / "more": 0.5}
    plain.save_pretrained(tmp_path / "plain")
    more.save_pretrained(tmp_path / "more")
    export_merged(trained.base, tmp_path / "merged", weights, dtype="float32", verify=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    names = {name: layer for name, layer in layers(trained.model).items() if name.endswith("down_proj")}
    for name, layer in names.items():
        path = name.removeprefix("base_model.model.")
        models = (trained.model, plain, more)
        held = [model.get_submodule(name) for model in models]
        s, o = (
            base + sum(w * (h.vectors("default")[k] - base) for w, h in zip(weights.values(), held, strict=True))
            for k, base in enumerate(layer.base_vectors)
        )
        expected = layer.base_layer.dequantize(s.detach(), o.detach())
        for weight, part in zip(weights.values(), held, strict=True):
            if (update := part.update("default")) is not None:
                expected += weight * update[0].detach() @ update[1].detach()
        torch.testing.assert_close(merged.get_parameter(f"{path}.weight"), expected, rtol=1e-4, atol=1e-5)


def test_damaged(tmp_path: Path):
    trained = make_trained(tmp_path, "llama", **CONFIG)
    key = "base_model.model.model.layers.0.mlp.up_proj.osora_"
    file = trained.adapter / "adapter_model.safetensors"
    whole = load_file(file)

    def without_b(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{key}B"]

    for edit, said in (
        (without_b, "no B for model.layers.0.mlp.up_proj"),
        (lambda t: t.update({f"{key}A": t[f"{key}A"][:1].clone()}), r"up_proj.osora_A has shape \(1, "),
        (lambda t: t[f"{key}A"].fill_(float("nan")), r"up_proj.osora_A holds NaN"),
    ):
        edit_tensors(file, edit)
        refused(tmp_path, said, trained.base, trained.adapter)
        with pytest.raises(CheckpointError):
            load_model(trained.adapter)
        edit_tensors(file, lambda t: (t.clear(), t.update(whole)))


@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True])
def test_no_rank(value: Any):
    with pytest.raises(ConfigError, match="update_rank must be an integer of at least 0"):
        OsoraConfig(update_rank=value)


def test_the_optimizer_has_a_group_for_it(base: Path):
    model = get_peft_model(load(base), OsoraConfig(modules_to_save=["norm"], **CONFIG))
    optimizer = create_optimizer(model, lr=1e-2, update_lr=2e-3, modules_to_save_lr=1e-4)
    by_rate = {group["lr"]: {name.split(".osora_")[-1][0] for name in group["param_names"] if ".osora_" in name}
               for group in optimizer.param_groups}  # fmt: skip
    assert by_rate == {1e-2: {"s", "o"}, 2e-3: {"A", "B"}, 1e-4: set()}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):  # at first B is zero, and A has no gradient
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_a_run_and_its_resumption(tmp_path: Path):
    base = make_base(tmp_path / "base", make_checkpoint(tmp_path / "llama", "llama-text"), QosoraConfig(rank=8))
    data = write_jsonl(tmp_path / "train.jsonl", sums(12))
    options: dict[str, Any] = {
        "model": str(base), "data": str(data), "max_steps": 6, "save_steps": 2, "update_rank": 1,
        "update_learning_rate": 5e-3, "progress": False, "batch_size": 2,
    }  # fmt: skip
    whole = train(TrainConfig(output_dir=str(tmp_path / "whole"), **options))
    again = train(TrainConfig(output_dir=str(tmp_path / "again"), **options))
    files = [Path(run.output_dir) / "adapter_model.safetensors" for run in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()  # A is drawn of the run's seed
    for name in ("adapter_config.json", "result.json", "adapter_model.safetensors", "qosora_manifest.json"):
        (tmp_path / "again" / name).unlink()

    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    resumed = train(TrainConfig(output_dir=str(tmp_path / "again"), resume=True, **options))
    assert resumed.resumed_from == 4
    assert files[0].read_bytes() == files[1].read_bytes()
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert (config["update_rank"], config["format_version"]) == (1, 2)
    with pytest.raises(ConfigError, match="another update_rank"):
        train(TrainConfig(output_dir=str(tmp_path / "again"), resume=True, **{**options, "update_rank": 2}))


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": False}, {"update_rank": 3}])
def test_planned_equals_measured(base: Path, options: dict[str, Any]):
    found = profile(base, batch_size=2, seq_len=48, steps=1, **{"update_rank": 1, **options})
    assert found.planned is not None
    assert found.planned.phases == pytest.approx(found.live.phases, rel=0.01)


def test_extrapolated_layers_equal_the_whole_model():
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=6, max_position_embeddings=128,
    )  # fmt: skip
    plain, step = (StepOptions(update_rank=rank) for rank in (0, 2))
    few, whole = (TracedModel(config, QosoraConfig(rank=8), step, full_depth=full) for full in (False, True))
    got, expected = few.predict(Batch(2, 64)), whole.predict(Batch(2, 64))
    for phase in ("forward", "loss", "backward"):
        assert got.phases[phase] == expected.phases[phase], phase
    more = few.trained_parameters - TracedModel(config, QosoraConfig(rank=8), plain).trained_parameters
    assert more == 6 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))


def test_the_command_plans_it(capsys: pytest.CaptureFixture[str]):
    for rank in ("0", "1"):
        assert main(["plan", "llama-2-7b", "--update-rank", rank, "--no-grid", "--json"]) == 0
    plans = [json.loads(text) for text in capsys.readouterr().out.strip().replace("}\n{", "}\0{").split("\0")]
    assert plans[1]["trained_parameters"] - plans[0]["trained_parameters"] == 32 * (4 * 8192 + 3 * (4096 + 11008))

"""What PEFT offers beside training: several adapters on one base, combined, copied, looked at, taken off again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from tiny import align, load, logits, make_base, make_checkpoint, perturbed, token_ids
from transformers import AutoModelForCausalLM

from qosora import QosoraConfig, export_merged
from qosora.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("utilities")
    make_base(folder / "base", make_checkpoint(folder / "source"), QosoraConfig(rank=8))
    for seed, name, config in ((1, "a", {}), (2, "b", {}), (3, "part", {"vectors": "o", "target_modules": ["q_proj"]})):
        perturbed(load(folder / "base"), seed, **config).save_pretrained(folder / name)
    return folder


def with_adapters(folder: Path, *names: str) -> PeftModel:
    model = PeftModel.from_pretrained(load(folder / "base"), folder / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, name)
    return model.eval()


def alone(folder: Path, name: str) -> torch.Tensor:
    return logits(with_adapters(folder, name))


@pytest.mark.parametrize(
    ("names", "weights"), [(["a", "b"], [0.5, 0.25]), (["a", "part"], [1.0, -0.5]), (["a"], [2.0])]
)
def test_a_combination_is_what_export_makes_of_it(folder: Path, tmp_path: Path, names: list[str], weights: list[float]):
    model: Any = with_adapters(folder, *names)
    model.add_weighted_adapter(names, weights, "mixed")
    model.set_adapter("mixed")
    got = logits(model)
    adapters = dict(zip([folder / name for name in names], weights, strict=True))
    export_merged(folder / "base", tmp_path / "merged", adapters, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(got, logits(merged), atol=2e-5, rtol=1e-4)
    model.set_adapter("a")
    torch.testing.assert_close(logits(model), alone(folder, "a"))
    model.save_pretrained(tmp_path / "saved", selected_adapters=["mixed"])
    again = PeftModel.from_pretrained(load(folder / "base"), tmp_path / "saved" / "mixed")
    torch.testing.assert_close(logits(again), got)


def test_combinations_that_cannot_be(folder: Path):
    model: Any = with_adapters(folder, "a", "b")
    for names, weights, name, kind, match in (
        (["a", "z"], [1, 1], "c", "linear", "there is no adapter 'z'"),
        (["a", "b"], [1], "c", "linear", "2 adapters and 1 weights"),
        (["a"], [1], "b", "linear", "there is an adapter 'b' already"),
        (["a"], [1], "c", "svd", "must be 'linear'"),
    ):
        with pytest.raises(ConfigError, match=match):
            model.add_weighted_adapter(names, weights, name, kind)
    updated: Any = perturbed(load(folder / "base"), update_rank=1)
    with pytest.raises(ConfigError, match="has more than vectors"):
        updated.add_weighted_adapter(["default"], [1.0], "c")


def test_several_are_switched_copied_deleted_and_told_of(folder: Path):
    model = with_adapters(folder, "a", "b")
    expected = {name: alone(folder, name) for name in ("a", "b")}
    for name in ("b", "a", "b"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
    assert torch.equal(logits(copy.deepcopy(model)), expected["b"])
    status = model.get_model_status()
    assert (status.active_adapters, status.available_adapters) == (["b"], ["a", "b"])
    assert {layer.module_type for layer in model.get_layer_status()} == {"osora.OsoraLayer"}
    with model.disable_adapter():
        base = load(folder / "base")
        assert torch.equal(logits(model), logits(base))
    with pytest.warns(UserWarning, match="Setting active adapter to a"):
        model.delete_adapter("b")
    assert torch.equal(logits(model), expected["a"])
    with pytest.raises(ValueError, match="b"):
        model.set_adapter("b")


def test_one_runs_at_a_time(folder: Path):
    model = with_adapters(folder, "a", "b")
    ids = token_ids()
    for call in (model, model.generate):
        with pytest.raises(ConfigError, match="one adapter at a time"):
            call(input_ids=ids, adapter_names=["a"] * len(ids))
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):  # set_adapter costs no more here
        hotswap_adapter(model, str(folder / "b"), adapter_name="a")


def test_merged_while_it_is_trained_as_for_a_server_of_answers(folder: Path):
    """GRPO with vLLM merges, sends the weights, and takes the adapter out again, at every step."""
    model = with_adapters(folder, "a")
    align(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected)
        model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), expected)


def test_tensors_by_name(folder: Path):
    a, b = with_adapters(folder, "a"), with_adapters(folder, "b")
    found = get_peft_model_state_dict(b, adapter_name="b")
    missing = set_peft_model_state_dict(a, found, adapter_name="a")
    assert not missing.unexpected_keys
    assert torch.equal(logits(a), logits(b))


@pytest.mark.parametrize(
    "settings",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"ACCELERATE_USE_FSDP": "true"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
    ],
)
def test_what_accelerate_would_divide_is_not_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
):
    """Any trainer but that of `qosora train`, which knows better; what is only run may be there."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"accelerate is configured for (FSDP[12]|DeepSpeed), .*--strategy fsdp"):
        perturbed(load(folder / "base"))
    with_adapters(folder, "a")

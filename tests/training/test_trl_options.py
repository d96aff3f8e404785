"""Options on their way to TRL: precision by device, everything reachable, nothing set behind our back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from qosora.errors import ConfigError
from qosora.training.config import OPTIMIZER_NAMES, SCHEDULES, TrainConfig
from qosora.training.trl_options import choose_precision, trl_config


def config(**options: Any) -> TrainConfig:
    return TrainConfig(model="base", data="data.jsonl", output_dir="run", **options)


def test_precision_by_device(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_precision("auto") == "fp32"
    assert choose_precision("bf16") == "bf16"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_precision("fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_precision("auto") == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert not caplog.records
    assert choose_precision("auto") == "fp16"
    assert "does not compute in bfloat16" in caplog.text
    with pytest.raises(ConfigError, match="does not compute in bfloat16"):
        choose_precision("bf16")


@pytest.mark.parametrize(
    ("options", "precision", "bf16", "fp16"),
    [({}, "fp32", False, False), ({}, "bf16", False, False), ({"modules_to_save": ["lm_head"]}, "bf16", True, False)],
)
def test_autocast_only_where_it_is_needed(options: dict[str, Any], precision: str, bf16: bool, fp16: bool):
    made = trl_config(config(**options), precision, Path("run"))
    assert (made.bf16, made.fp16) == (bf16, fp16)
    assert made.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "cosine_with_min_lr"])
def test_schedules_exist(schedule: str):
    assert trl_config(config(schedule=schedule), "fp32", Path("run")).lr_scheduler_type == schedule


def test_optimizers_exist():
    from qosora.training.flat_buffers import OPTIMIZERS as built

    assert set(OPTIMIZER_NAMES) == set(built)


def test_any_further_option_by_name():
    made = trl_config(config(trl={"neftune_noise_alpha": 5.0, "lr_scheduler_kwargs": {"x": 1}}), "fp32", Path("run"))
    assert made.neftune_noise_alpha == 5.0


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "grpo"])
def test_no_loss_for_routers_that_are_frozen(method: str):
    more = {"reward": ["exact"]} if method == "grpo" else {}
    assert trl_config(config(method=method, **more), "fp32", Path("run")).router_aux_loss_coef == 0
    asked = trl_config(config(method=method, trl={"router_aux_loss_coef": 0.1}, **more), "fp32", Path("run"))
    assert asked.router_aux_loss_coef == 0.1


def test_numbers_that_yaml_takes_for_text():
    options = {"adam_epsilon": "1e-6", "lr_scheduler_kwargs": {"min_lr": "2e-5"}, "run_name": "e5"}
    made = trl_config(config(trl=options), "fp32", Path("run"))
    assert (made.adam_epsilon, made.lr_scheduler_kwargs, made.run_name) == (1e-6, {"min_lr": 2e-5}, "e5")


def test_a_schedule_that_needs_its_lowest_rate():
    made = trl_config(config(schedule="cosine_with_min_lr"), "fp32", Path("run"))
    assert made.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    options = {"lr_scheduler_kwargs": {"min_lr": 1e-4}}
    made = trl_config(config(schedule="cosine_with_min_lr", trl=options), "fp32", Path("run"))
    assert made.lr_scheduler_kwargs == {"min_lr": 1e-4}


def test_several_gpus_are_not_used_by_data_parallel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: 4))
    assert trl_config(config(), "fp32", Path("run"))._n_gpu == 1


def test_all_problems_of_sft_at_once():
    options = {"loss_typ": "dft", "optim": "adamw_torch", "packing": True, "eos_token": "x", "learning_rate": 1}
    with pytest.raises(ConfigError) as caught:
        trl_config(config(trl=options, use_liger=True), "fp32", Path("run"))
    assert caught.value.problems[:5] == [
        "trl: TRL's SFTConfig has no option 'loss_typ'; did you mean 'loss_type'?",
        "trl: optim is the option 'optimizer' of qosora; set that",
        "trl: packing is the option 'packing' of qosora; set that",
        "trl: eos_token has no effect here, as qosora loads the model and prepares the data itself",
        "trl: learning_rate is the option 'learning_rate' of qosora; set that",
    ]
    with pytest.raises(ConfigError, match="TRL refuses the options: "):
        trl_config(config(trl={"adam_beta1": 0.9, "hub_strategy": "nonsense"}), "fp32", Path("run"))


def test_a_run_is_named_as_its_folder(tmp_path: Path):
    """By which what is logged before, in and after training is one run."""
    given: dict[str, Any] = {"model": "m", "data": "d", "output_dir": str(tmp_path / "my-run")}
    assert trl_config(TrainConfig(**given), "fp32", tmp_path / "my-run").run_name == "my-run"
    named = TrainConfig(**given, trl={"run_name": "other"})
    assert trl_config(named, "fp32", tmp_path / "my-run").run_name == "other"

"""TRL's trainers on an adapter that has been trained already: the reference is that adapter, and the losses say so."""

from __future__ import annotations

import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import make_tokenizer, perturbed
from transformers import AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)  # fmt: skip

from qosora.base.load import load_base
from qosora.config import OsoraConfig, QosoraConfig
from qosora.training.optimizer import create_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TEXTS = ["1+1=", "2+3=", "4+4=", "5+2="]
PAIRS = {"prompt": TEXTS, "chosen": ["2", "5", "8", "7"], "rejected": ["3", "4", "9", "1"]}
LABELED = {"prompt": TEXTS * 2, "completion": [*PAIRS["chosen"], *PAIRS["rejected"]], "label": [True] * 4 + [False] * 4}
OPTIONS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
    "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "beta": 0.5,
}  # fmt: skip


def longer(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between answers."""
    return [float(len(set(text))) for text in completions]


@pytest.fixture
def adapted(place: Path) -> Any:
    """A base with an adapter that is not where it began, to train on."""
    return perturbed(load_base(place / "base"), task_type="CAUSAL_LM", update_rank=1).train()


def trained(trainer: type, config: type, model: Any, data: dict[str, Any], tmp_path: Path, **options: Any) -> Any:
    """Return the trainer after its steps."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rewards = {"reward_funcs": options.pop("reward_funcs")} if "reward_funcs" in options else {}
    args = config(output_dir=str(tmp_path), **OPTIONS | options)
    made = trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        optimizers=(create_optimizer(model, lr=args.learning_rate), None),
        **rewards,
    )
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    made.train()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, start[n])} == {
        n for n in start if n.endswith(".default") and "osora_" in n
    }
    return made


def logged(trainer: Any, key: str) -> list[float]:
    return [float(line[key]) for line in trainer.state.log_history if key in line]


def test_dpo_from_an_adapter_begins_at_ln_2(adapted: Any, tmp_path: Path) -> None:
    losses = logged(trained(DPOTrainer, DPOConfig, adapted, PAIRS, tmp_path), "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 1e-3


def test_kto_from_an_adapter_begins_at_one_half(adapted: Any, tmp_path: Path) -> None:
    trainer = trained(KTOTrainer, KTOConfig, adapted, LABELED, tmp_path, per_device_train_batch_size=8)
    assert logged(trainer, "loss")[0] == pytest.approx(0.5, abs=1e-6)
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)


def test_grpo_from_an_adapter_begins_with_no_divergence(adapted: Any, tmp_path: Path) -> None:
    options = {"reward_funcs": longer, "num_generations": 4, "max_completion_length": 6}
    divergences = logged(trained(GRPOTrainer, GRPOConfig, adapted, {"prompt": TEXTS}, tmp_path, **options), "kl")
    assert divergences[0] == pytest.approx(0.0, abs=1e-6)
    assert divergences[-1] > 1e-5


def test_an_adapter_by_the_config_of_another_is_its_copy(adapted: Any) -> None:
    adapted.add_adapter("ref", adapted.peft_config["default"])
    parameters = dict(adapted.named_parameters())
    copies = [name for name in parameters if name.endswith(".ref")]
    assert len(copies) == sum(name.endswith(".default") for name in parameters)
    for name in copies:
        twin = parameters[name.removesuffix(".ref") + ".default"]
        assert torch.equal(parameters[name], twin)
        assert parameters[name].data_ptr() != twin.data_ptr()
        assert not parameters[name].requires_grad
    assert adapted.peft_config["ref"] is not adapted.peft_config["default"]


# ---- the other trainers, on the vectors of a base as it is


def experimental(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"trl.experimental.{name.lower()}")
    prefix = {"online_dpo": "OnlineDPO"}.get(name, name.upper())
    return getattr(module, f"{prefix}Trainer"), getattr(module, f"{prefix}Config")


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("cpo", PAIRS, {"max_length": 32}),
        ("orpo", PAIRS, {"max_length": 32}),
        ("rloo", {"prompt": TEXTS}, {"reward_funcs": longer, "num_generations": 4, "max_completion_length": 6}),
        ("online_dpo", {"prompt": TEXTS}, {"reward_funcs": longer, "max_new_tokens": 6}),
    ],
)
def test_each_trainer_trains_the_vectors_alone(
    place: Path, tmp_path: Path, name: str, data: dict[str, Any], options: dict[str, Any]
) -> None:
    trainer, config = (RLOOTrainer, RLOOConfig) if name == "rloo" else experimental(name)
    model = get_peft_model(load_base(place / "base"), OsoraConfig(task_type="CAUSAL_LM")).train()
    losses = logged(trained(trainer, config, model, data, tmp_path, **options), "loss")
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))


def test_a_reward_model_learns_which_answer_is_better(place: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(
        place / "llama", num_labels=1, quantization_config=QosoraConfig(rank=8)
    )
    config = OsoraConfig(task_type="SEQ_CLS", modules_to_save=["score"])
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id
    model = get_peft_model(base, config).train()
    options = {key: value for key, value in OPTIONS.items() if key != "beta"}
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path), **options | {"max_steps": 12}),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer,
        optimizers=(create_optimizer(model, lr=1e-2, modules_to_save_lr=1e-3), None),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 1e-2

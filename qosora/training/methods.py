"""The ways of learning that TRL or transformers has trainers for: what each is configured by, and learns from."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from qosora.checkpoints import REWARD, TAGS, TEXTS
from qosora.compat.trl import orpo

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A way of learning.

    Args:
        config: TRL's configuration of it.
        form: Of its data, as `load_records` takes it.
        tasks: Of the models that learn so, as `task_of` has them; None is a language model.
    """

    config: type[TrainingArguments]
    form: str
    tasks: tuple[str | None, ...] = (None,)


#: By the name in `TrainConfig`.
METHODS = {
    "sft": Method(SFTConfig, "language"),
    "dpo": Method(DPOConfig, "preference"),
    "kto": Method(KTOConfig, "labeled"),
    "orpo": Method(orpo("ORPOConfig"), "preference"),
    "grpo": Method(GRPOConfig, "prompts"),
    "reward": Method(RewardConfig, "preference", (REWARD,)),
    "classify": Method(TrainingArguments, "classes", (TEXTS, TAGS)),
}

"""The ways of learning that TRL has trainers for: what each is configured by, learns from, and is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

from qosora.compat.trl import orpo

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A way of learning.

    Args:
        config: TRL's configuration of it.
        form: Of its data, as `load_records` takes it.
        learning_rate: Of the vectors, by default.
        figures: What its logs show success by, the first for the progress bar.
    """

    config: type[TrainingArguments]
    form: str
    learning_rate: float
    figures: tuple[str, ...]


#: By the name in `TrainConfig`.
METHODS = {
    "sft": Method(SFTConfig, "language", 1e-2, ("loss",)),
    "dpo": Method(DPOConfig, "preference", 1e-3, ("loss", "rewards/accuracies", "rewards/margins")),
    "kto": Method(KTOConfig, "labeled", 1e-3, ("loss", "rewards/margins")),
    "orpo": Method(orpo("ORPOConfig"), "preference", 1e-3, ("loss", "rewards/accuracies", "rewards/margins")),
    "grpo": Method(GRPOConfig, "prompts", 1e-3, ("reward",)),
}

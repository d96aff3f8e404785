"""The ways of learning that TRL has trainers for: what each is configured by, and learns from."""

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
    """

    config: type[TrainingArguments]
    form: str
    learning_rate: float


#: By the name in `TrainConfig`.
METHODS = {
    "sft": Method(SFTConfig, "language", 1e-2),
    "dpo": Method(DPOConfig, "preference", 1e-3),
    "kto": Method(KTOConfig, "labeled", 1e-3),
    "orpo": Method(orpo("ORPOConfig"), "preference", 1e-3),
    "grpo": Method(GRPOConfig, "prompts", 1e-3),
}

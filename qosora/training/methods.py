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
    """

    config: type[TrainingArguments]
    form: str


#: By the name in `TrainConfig`.
METHODS = {
    "sft": Method(SFTConfig, "language"),
    "dpo": Method(DPOConfig, "preference"),
    "kto": Method(KTOConfig, "labeled"),
    "orpo": Method(orpo("ORPOConfig"), "preference"),
    "grpo": Method(GRPOConfig, "prompts"),
}

"""The head of a model that is no language model, which is trained in full beside the vectors.

It is in float32, as all that PEFT trains in full, and what comes before it may be in 16 bits: its input is cast, so
that nothing else needs autocast.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import nn

from qosora.base import head_modules
from qosora.checkpoints import TAGS, task_of
from qosora.config import OsoraConfig
from qosora.data import IGNORED

__all__ = ["cast_to_heads", "class_loss", "with_head"]


def with_head(config: OsoraConfig, model: Any) -> OsoraConfig:
    """Return what is trained of a base: what the configuration says, and its head, if it has one."""
    task = task_of(model.config)
    if task is None:
        return config
    in_full = [*(config.modules_to_save or []), *head_modules(model)]
    return replace(config, task_type="TOKEN_CLS" if task == TAGS else "SEQ_CLS", modules_to_save=in_full)


def cast_to_heads(model: Any) -> None:
    """Have what a PEFT model trains in full cast its input."""

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                head.register_forward_pre_hook(cast)


def class_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the mean cross-entropy of a step's classes; the models' own do not all divide by those of the whole step.

    Args:
        outputs: With logits, (..., classes).
        labels: (...), int64, `IGNORED` where there is none.
        num_items_in_batch: Classes of the whole step; those here by default.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)

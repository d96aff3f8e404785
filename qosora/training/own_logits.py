"""The loss of models whose logits are more than a product of the last hidden states with the output layer.

TRL computes the log-probabilities of tokens from hidden states and the output layer's weight, so that all logits never
exist. It knows of factors and caps by some names in a configuration. Of other models (ModernBERT's decoder, BERT's
kind, Inkling, RecurrentGemma) it would compute the loss of another model, without a word.

So both are computed of a few random states, once; where they differ, the model's own forward makes the logits of some
tokens after others, which are made again for their gradients. Where it needs more than states, it makes all at once.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from qosora.compat.trl import FusedCausalLMOutput
from qosora.data import IGNORED
from qosora.inference import logits_of_states, logits_rows, returning
from qosora.layers import name_backbone

__all__ = ["keep_own_logits"]

logger = getLogger("qosora")

#: Ways to compute the loss.
_PRODUCT, _IN_PIECES, _AT_ONCE = "as a product", "some tokens at a time", "all at once"
#: Random states, how far their logits spread (caps are at 30 or 50), and what part of that is rounding in 16 bits.
_STATES, _SPREAD, _ROUNDING = 8, 20.0, 0.02


@dataclass
class _States(ModelOutput):
    """What any backbone returns: the states, and None by every other name."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def keep_own_logits(model: Any, temperature: float = 1.0) -> None:
    """See to it that `model(..., fused_lm_head=True)` is of the model's own logits.

    Args:
        model: A language model that TRL's `add_fused_lm_head` has changed.
        temperature: As given to that.
    """
    fused = model.forward
    decided: list[str] = []

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **kwargs)
        if not decided:
            decided.append(_way(self, fused))
            if decided[0] != _PRODUCT:
                logger.info("the loss is of the logits that %s makes itself, %s", type(self).__name__, decided[0])
        if decided[0] == _PRODUCT:
            return fused(*args, fused_lm_head=True, **kwargs)
        return _of_own_logits(self, fused if decided[0] == _AT_ONCE else None, temperature, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def _way(model: Any, fused: Callable[..., Any]) -> str:
    """Return in which of the ways to compute the loss."""
    try:
        name_backbone(model)
        return _PRODUCT if _is_product(model, fused) else _IN_PIECES
    except torch.OutOfMemoryError:  # which says nothing of the model
        raise
    except Exception:  # whatever its forward misses in states alone: ProphetNet's several streams, say
        return _AT_ONCE


@torch.no_grad()
def _is_product(model: Any, fused: Callable[..., Any]) -> bool:
    """Say whether TRL's log-probabilities are those of the model's own logits."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings().weight
    width = getattr(model.config.get_text_config(), "hidden_size", head.weight.shape[1])
    if head.weight.shape[1] != width:
        return False
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_STATES, width, generator=generator).to(embeddings.device, embeddings.dtype)
    own = logits_of_states(model, states, _States).float()
    states *= _SPREAD / float(own.std().clamp(min=1e-3))
    own = logits_of_states(model, states, _States).float()
    ids = torch.randint(own.shape[-1], (1, _STATES), generator=generator).to(embeddings.device)
    with returning(model, _States(states[None])):
        found = fused(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    expected = own.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return bool((found - expected).abs().max() <= _ROUNDING * own.abs().max())


def _of_own_logits(
    model: Any,
    whole: Callable[..., Any] | None,
    temperature: float,
    *args: Any,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """Do as TRL's fused forward, by a forward that makes all logits, or by the backbone and pieces of them."""
    output = (whole or model.base_model)(*args, **{**kwargs, "use_cache": False})
    rows = output.logits if whole else output.last_hidden_state
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    rows = rows[:, :-1] if shift_labels is None else rows
    mask = targets != IGNORED
    chosen, wanted = rows[mask], targets[mask]

    def figures(rows: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = (rows if whole else logits_of_states(model, rows, type(output))).float() / temperature
        log_probs = logits.log_softmax(-1)
        of_tokens = log_probs.gather(-1, tokens[:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return of_tokens, entropy, (2 * log_probs).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == tokens

    size = logits_rows(model)
    pieces = zip(torch.split(chosen, size), torch.split(wanted, size), strict=True)
    parts = [checkpoint(figures, *piece, use_reentrant=False) for piece in pieces]
    columns = map(torch.cat, zip(*parts, strict=True))
    # As TRL's, so that a batch without a token to train on is a zero with gradients.
    placed = [column.new_zeros(mask.shape).masked_scatter(mask, column) for column in columns]
    log_probs, entropy, sum_sq, mean_logits, is_top1 = placed
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=log_probs,
        entropy=entropy,
        log_sum_sq_probs=sum_sq,
        mean_logits=mean_logits,
        is_top1=is_top1,
        label_mask=mask,
    )

"""One training step as `qosora train` makes it, for a tracer to look at: on the meta device or on a real one.

What decides about memory is the trainer's own: TRL's fused head and loss, transformers' checkpointing, the packed
optimizer, gradients that are dropped after each step. A test compares it with the trainer's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from qosora.checkpoints import REWARD, task_of
from qosora.compat.bitsandbytes import is_paged, quant_tensors
from qosora.compat.transformers import keeps_logits, lengthen_cache
from qosora.compat.trl import add_fused_lm_head, loss_chunks
from qosora.decompose import nf4
from qosora.layers import (
    DecomposedMatrix,
    Tiling,
    apply_tiling,
    name_backbone,
    panel_of,
    qosora_modules,
    require_checkpointing,
)
from qosora.memory.options import Batch
from qosora.memory.tracer import Tracer
from qosora.training import PackedPagedOptimizer, cast_to_heads, class_loss

__all__ = ["prepare_model", "register_model", "register_optimizer", "training_step", "write_answers"]


def prepare_model(model: Any, *, gradient_checkpointing: bool, tiling: Tiling, fused_head: bool = True) -> None:
    """Do to a PEFT model what `train` and TRL's trainer do to it before it trains; other methods have no tiles."""
    base: PreTrainedModel = model.get_base_model()
    if task_of(base.config) is not None:
        cast_to_heads(model)
    elif fused_head:
        name_backbone(base)
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    if gradient_checkpointing:
        require_checkpointing(base)
        base.enable_input_require_grads()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if qosora_modules(model):
        apply_tiling(model, tiling.length, mlps=tiling.mlps)
    model.train()


def register_model(tracer: Tracer, model: Any) -> None:
    """Count a model's parameters and buffers, each in its category."""
    base = model.get_base_model()
    ends = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    tracer.register((p for module in ends for p in module.parameters()), "embeddings and head")
    for layer in qosora_modules(model).values():
        for name, p in layer.named_parameters(recurse=False):
            if name != "bias" and not isinstance(layer, DecomposedMatrix):
                tracer.register([p], "base residual" if name.startswith("weight") else "factors")
        tracer.register([nf4.absmax_code(layer.s.device)], "base residual")
        if isinstance(layer, DecomposedMatrix):
            tracer.register([nf4.code_table(layer.quant_type, layer.s.device)], "embeddings and head")
    for p in model.parameters():
        if stored := quant_tensors(p):
            tracer.register([p, *stored], "base residual")
    tracer.register((p for p in model.parameters() if p.requires_grad), "adapter")
    tracer.register(_new(tracer, model.parameters()), "norms, biases, buffers")
    tracer.register(_new(tracer, model.buffers()), "norms, biases, buffers")


def _new(tracer: Tracer, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if not tracer.knows(tensor)]


def register_optimizer(tracer: Tracer, optimizer: Any) -> None:
    """Count an optimizer's states, and the buffers that the packed one keeps parameters and gradients in."""
    for buffer in optimizer.buffers if isinstance(optimizer, PackedPagedOptimizer) else []:
        tracer.register([buffer.flat], "adapter")
        if buffer.grad is not None:
            tracer.register([buffer.grad], "gradients")
        tracer.register(_unpaged(buffer.tensors()), "optimizer state")
    for state in optimizer.state.values():
        tracer.register(_unpaged(state), "optimizer state")


def _unpaged(state: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors but those in managed memory, which CUDA's allocator does not count either."""
    return [t for t in state.values() if isinstance(t, torch.Tensor) and not is_paged(t)]


def training_step(
    model: Any,
    batch: dict[str, torch.Tensor],
    optimizer: Any,
    tracer: Tracer | None = None,
    *,
    loss: str = "chunked",
    max_grad_norm: float = 1.0,
    saving: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> torch.Tensor:
    """Run one step of `QosoraTrainer`, telling a tracer where it is; return the loss.

    Args:
        model: A PEFT model that `prepare_model` has prepared.
        batch: What `Batch.tensors` makes.
        optimizer: With `step()`.
        tracer: Entered, and following the model; None for a step that nobody looks at.
        loss: "chunked", never building all logits, "whole", or "orpo", of a batch whose first half is preferred.
        max_grad_norm: To clip to; 0 does not clip.
        saving: Context of forward and backward, where activations are offloaded.
    """
    begin = (lambda phase: None) if tracer is None else tracer.enter_phase
    with nullcontext() if tracer is None else _gradients_counted(model, tracer), saving():
        begin("forward")
        value = _loss(model, batch, loss)
        begin("loss")  # also where the backbone is not told apart
        value.backward()  # type: ignore[no-untyped-call]
    begin("optimizer")
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    model.zero_grad()
    return value.detach()


@torch.no_grad()
def write_answers(model: Any, batch: Batch, vocab: int, tracer: Tracer) -> None:
    """Do the first and the last forward of those by which a trainer writes answers: the memory of both is the most.

    Args:
        model: As `training_step` takes it.
        batch: Of which some tokens are written.
        vocab: Tokens that there are.
        tracer: Entered, and following the model.
    """
    base = model.get_base_model()
    device, rows, prompt = base.device, batch.size * batch.rounds, batch.length - batch.written
    last = {"logits_to_keep": 1} if keeps_logits(base) else {}
    tracer.enter_phase("answers")
    model.eval()
    with tracer.allocating("batch"):
        mask = torch.ones(rows, prompt + max(1, batch.written - 1), dtype=torch.int64, device=device)
        ids = mask * (vocab // 2)
    outputs = model(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True, **last)
    _sampled(outputs.logits)
    cache = outputs.past_key_values
    del outputs
    with tracer.allocating("keys and values"):
        lengthen_cache(cache, max(0, batch.written - 2))
    outputs = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True, **last)
    _sampled(outputs.logits)
    model.train()


def _sampled(logits: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of the next token, as transformers' sampling makes them."""
    return logits[:, -1].to(copy=True, dtype=torch.float32).softmax(-1)


def _loss(model: Any, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """As the trainer of the model's kind computes it."""
    task = task_of(model.get_base_model().config)
    if task == REWARD:
        return -F.logsigmoid(model(**batch).logits).mean()
    if task is not None:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return class_loss(model(**inputs), batch["labels"])
    items = (batch["labels"] != -100).sum()
    if kind == "orpo":
        return _orpo(model, batch)
    if kind == "whole":
        loss: torch.Tensor = model(**batch, use_cache=False, num_items_in_batch=items).loss
        return loss
    with loss_chunks(panel_of(model)):
        outputs = model(**batch, use_cache=False, fused_lm_head=True)
    per_token_loss = -outputs.log_probs
    return per_token_loss.sum() / torch.as_tensor(items).clamp(min=1)


def _orpo(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """ORPO's loss (arXiv 2403.07691) by what TRL's trainer builds for it, in its order."""
    from qosora.compat.trl import orpo_log_probs

    labels, half = batch["labels"], len(batch["labels"]) // 2
    logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
    preferred = logits[:half, :-1].contiguous().flatten(0, 1)
    of_preferred = F.cross_entropy(preferred, labels[:half, 1:].flatten())
    chosen, rejected = orpo_log_probs(logits, labels, average_log_prob=True).float().split(half)
    odds = (chosen - rejected) - ((-chosen.exp()).log1p() - (-rejected.exp()).log1p())
    return of_preferred - F.logsigmoid(odds).mean()


@contextmanager
def _gradients_counted(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    def hook(p: torch.Tensor) -> None:
        if p.grad is not None:
            tracer.register([p.grad], "gradients")

    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(hook) for p in trained]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

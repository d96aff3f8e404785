"""TRL: the fused loss, which never builds all logits, and offloading of activations."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from qosora.compat.names import check, found, uses

_LOSS = "trl.kernels.chunked_logprob"
_OFFLOADING = "trl.models.get_act_offloading_ctx_manager"

_FOUND = found(
    __name__,
    {
        # Tokens that the loss takes at a time: where its memory stops growing with the batch.
        "TOKEN_CHUNK_SIZE": f"{_LOSS}.TOKEN_CHUNK_SIZE",
        # What SFTTrainer does to a model and with it; `plan` and `profile` make the same step.
        "add_fused_lm_head": "trl.trainer.utils.add_fused_lm_head(model, outputs)",
        # Tokens, labels and pixels of examples with images.
        "DataCollatorForVisionLanguageModeling": (
            "trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(processor, completion_only_loss)"
        ),
        # What such a model returns.
        "FusedCausalLMOutput": "trl.trainer.utils.FusedCausalLMOutput",
        "get_act_offloading_ctx_manager": f"{_OFFLOADING}(model)",
        # What ORPO builds of the logits.
        "orpo_log_probs": "trl.experimental.orpo.ORPOTrainer.get_batch_logps(logits, labels, average_log_prob)",
    },
)


def __getattr__(name: str) -> Any:
    return _FOUND(name)


class _Launched:
    """A Triton kernel: launched as `kernel[grid](...)`, allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    """Allocate nothing, as where cuBLAS adds a product to its float32 result."""


def _always(*_: Any) -> bool:
    return True


#: What the loss calls, module and name -> what it calls instead: a kernel is chosen by the device, and by Triton's
#: being there, so without it there are the kernels' names, too, of plain functions.
_ON_CUDA = {
    f"{_LOSS}._use_triton": _always,
    "trl.trainer.utils._use_triton": _always,
    f"{_LOSS}._forward_kernel": _Launched(),
    f"{_LOSS}._backward_kernel": _Launched(),
    f"{_LOSS}._addmm_fp32": _nothing,
}


@uses(*_ON_CUDA)
@contextmanager
def fused_loss_on_meta() -> Iterator[None]:
    """Let the loss take the ways on the meta device that it takes on CUDA, where kernels compute in place."""
    loss = check(_LOSS)
    with ExitStack() as stack:
        for dotted, instead in _ON_CUDA.items():
            module, _, name = dotted.rpartition(".")
            stack.enter_context(patch.object(check(module), name, instead))
        # Of triton, which is imported only where there is one, the loss asks for one function.
        cdiv = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
        stack.enter_context(patch.object(loss, "triton", cdiv, create=not hasattr(loss, "triton")))
        yield


@uses("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE")
@contextmanager
def loss_chunks(size: int | None) -> Iterator[None]:
    """Have the loss take so many tokens of the vocabulary at a time, not its own number of them; None changes nothing.

    It is read where the loss is computed; backward takes as many.
    """
    module = check("trl.trainer.utils")
    with nullcontext() if size is None else patch.object(module, "_CHUNKED_LOGPROB_CHUNK_SIZE", size):
        yield


@uses("trl.SFTTrainer: maybe_activation_offload_context")
def know_parameters_again(trainer: Any) -> None:
    """Tell a trainer's context of offloading where the parameters lie now, which it leaves where they are.

    It reads that in the trainer's constructor. An optimizer that moves them into a buffer of its own comes later.
    """
    if getattr(trainer.args, "activation_offloading", False):  # which not all trainers have
        make = check("trl.models.get_act_offloading_ctx_manager(model)")
        trainer.maybe_activation_offload_context = make(model=trainer.model)


@uses(f"{_OFFLOADING}(min_offload_size, max_fwd_stash_size)")
def offloading_limits() -> tuple[int, int]:
    """Return the bytes from which on a tensor is offloaded, and how many tensors are on their way at once."""
    parameters = inspect.signature(check(_OFFLOADING)).parameters
    return parameters["min_offload_size"].default, parameters["max_fwd_stash_size"].default


@uses("trl.SFTTrainer: use_liger_kernel")
def liger_warning() -> str:
    """Return a pattern of what TRL says to programmers of Liger's kernels: that the hub has others."""
    return ".*use_liger_kernel.*"


def orpo(name: str) -> Any:
    """Return a name of TRL's ORPO, which warns when imported that it may change: TRL's version is bound."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _orpo(name)


@uses("trl.experimental.orpo.ORPOConfig", "trl.experimental.orpo.ORPOTrainer")
def _orpo(name: str) -> Any:
    return check(f"trl.experimental.orpo.{name}")

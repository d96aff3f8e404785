"""The decoder's layers of a model: found, and compiled one by one. What there is of it below the output layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qosora.compat.torch import allow_recompiles
from qosora.errors import ConfigError, QosoraError

__all__ = [
    "backbone_module",
    "compile_layers",
    "decoder_layers",
    "exchanged_forward",
    "name_backbone",
    "require_checkpointing",
]


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module that holds the decoder's layers, and the list of them.

    Raises:
        QosoraError: There is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count and _is_layer(child[0]):
                return module, child
    raise QosoraError(f"{type(model).__name__} has no list of {count} decoder layers, as config.json says it has")


@contextmanager
def exchanged_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a module compute something else for a while."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


class _BelowHead:
    """What is below the output layer of a model that has no such module, but its language model has: Llama 4 that sees.

    Args:
        model: The whole model.
        inner: The language model in it.
    """

    def __init__(self, model: PreTrainedModel, inner: PreTrainedModel) -> None:
        self.model, self.inner = model, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the language model's backbone does when the whole model runs; no logits are made."""
        found: list[Any] = []
        head: Any = self.model.get_output_embeddings()
        backbone: Any = self.inner.base_model
        handle = backbone.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            with exchanged_forward(head, lambda states: states):
                type(self.model).forward(self.model, *args, **kwargs)
        finally:
            handle.remove()
        return found[-1]


def name_backbone(model: PreTrainedModel) -> None:
    """See to it that a language model's `base_model` is what is below its output layer, for losses that need no logits.

    Of `Llama4ForCausalLM` it is the whole model, as its class has another name for what it calls `model`. Where it is
    called, and no module has all of it, that is enough.

    Raises:
        QosoraError: There is no such thing.
    """
    if model.base_model is not model:
        return
    if isinstance(getattr(model, "model", None), nn.Module):
        model.base_model_prefix = "model"
        return
    head = model.get_output_embeddings()
    for inner in () if head is None else model.modules():
        if isinstance(inner, PreTrainedModel) and inner is not model and inner.get_output_embeddings() is head:
            name_backbone(inner)
            vars(model)["_below_head"] = _BelowHead(model, inner)
            model.base_model_prefix = "_below_head"
            return
    raise QosoraError(
        f"{type(model).__name__} has no module with all that is below its output layer, so its loss would need all "
        "logits at once; train the language model alone, or use transformers' Trainer"
    )


def backbone_module(model: PreTrainedModel) -> nn.Module:
    """Return the module whose output is what a model's output layer gets, after `name_backbone`."""
    backbone = model.base_model
    return backbone.inner.base_model if isinstance(backbone, _BelowHead) else backbone


def require_checkpointing(model: PreTrainedModel) -> None:
    """Refuse to checkpoint a model whose class cannot be.

    Raises:
        ConfigError: It cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} cannot recompute its activations: turn gradient_checkpointing off "
            "(--no-gradient-checkpointing)"
        )


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "gradient_checkpointing") or sum(1 for _ in module.children()) > 1


def compile_layers(model: Any) -> None:
    """Compile each decoder layer of a PEFT model: one graph does for all, where the whole would make a long one."""
    # With and without padding, gradients, evaluation; a last batch that is smaller: each is a graph of its own
    allow_recompiles(32)
    for layer in decoder_layers(model.get_base_model())[1]:
        layer.compile()

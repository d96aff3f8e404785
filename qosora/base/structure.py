"""Which layers of a model are decomposed, decided by its class alone: for the loader, the converter and the planner.

Every linear layer but the output layer, routers and what the user names becomes an empty `QosoraLinear`, the
projections of each expert of a mixture among them; embeddings and output layer only where the config says so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qosora.base.layout import stored_otherwise, take_stacks_apart
from qosora.checkpoints import CONFIG_NAME
from qosora.compat.transformers import forget_tie, modules_to_skip, shared_weights, should_convert_module, tied_weights
from qosora.config import QosoraConfig
from qosora.errors import ConfigError
from qosora.layers import (
    DecomposedMatrix,
    EightBitMatrix,
    LinearExperts,
    QosoraEmbedding,
    QosoraHead,
    QosoraLinear,
    VocabularyMatrix,
    first_format,
    linear_layers,
    qosora_modules,
    read_directly,
    router_names,
    split_experts,
    stack_experts,
    stacked_names,
)
from qosora.patterns import matches_module

__all__ = ["decompose_structure", "head_modules", "replace_linears", "skipped_modules"]

logger = logging.getLogger("qosora")


def decompose_structure(
    model: PreTrainedModel, config: QosoraConfig, *, stored: bool = False, stacks: bool = False
) -> list[str]:
    """Give a model the layers that it has as a base, all empty.

    Layers that cannot be replaced are added to the config's `modules_to_not_convert`, so that it says of what was made
    how it was.

    Args:
        model: The model, on the meta device.
        config: Ranks and storage, and what to leave as it is.
        stored: Whether a base is loaded, whose config was checked when the base was made.
        stacks: Whether to take experts apart that the model holds in one tensor; of a base, what its config says.

    Returns:
        The names of the decomposed layers.

    Raises:
        ConfigError: If no layer is left, or the config names layers that the model has not.
    """
    split_experts(model)
    if stacks:
        take_stacks_apart(model)
    elif config.stacks_format is not None:
        take_stacks_apart(model, config.stacks_format)
    if not stored:
        config.stacks_format = first_format(model)
        if problems := _unmatched_patterns(model, config):
            raise ConfigError(problems)
        _leave_what_cannot_be_replaced(model, config)
    skip = skipped_modules(model, config)
    if not stored:
        _warn_of_stacks(model, skip)
    replaced = replace_linears(model, config, skip)
    if config.embeddings is not None:
        _replace_embeddings(model, config)
    if not any(isinstance(module, LinearExperts) and qosora_modules(module) for module in model.modules()):
        stack_experts(model)
    return replaced


def _leave_what_cannot_be_replaced(model: PreTrainedModel, config: QosoraConfig) -> None:
    heads = _head(model)
    if shared := _shared(model):
        _tell_left(model, shared, "other layers share their weights")
    for names, why in (
        (read_directly(model), "it uses their weights without calling them"),
        (stored_otherwise(model), "their weights have another form or name on disk"),
        (heads, "they are its head, which is trained in full"),
    ):
        left = [name for name in names if _converts(name, skipped_modules(model, config))]
        if left:
            patterns = list(dict.fromkeys(left if names is heads else map(_end, left)))
            config.modules_to_not_convert = [*(config.modules_to_not_convert or []), *patterns]
            _tell_left(model, left, why)


def _tell_left(model: PreTrainedModel, names: list[str], why: str) -> None:
    kinds = ", ".join(dict.fromkeys(map(_end, names)))
    logger.info("%d layers of %s stay in 16 bits, as %s: %s", len(names), type(model).__name__, why, kinds)


def _end(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def _shared(model: PreTrainedModel) -> list[str]:
    """Return the linear layers, but the output layer, that have another's weight: as Zamba's attention has."""
    tied = shared_weights(model)
    head = model.get_output_embeddings()
    return [name for name, module in linear_layers(model).items() if f"{name}.weight" in tied and module is not head]


def _head(model: PreTrainedModel) -> list[str]:
    """Return the linear layers of a classifier's head, and those in modules whose names end as its does.

    PEFT tells by the end of a name what is trained in full: with `head` also `vision_model.head`.
    """
    heads = tuple(head_modules(model))
    return [name for name in linear_layers(model) if heads and any(path.endswith(heads) for path in _paths(name))]


def head_modules(model: PreTrainedModel) -> list[str]:
    """Return the modules beside the base model of one that is no language model: of a classifier, its head.

    They stay in 16 bits, and are trained in full.
    """
    base = model.base_model_prefix
    if model.get_output_embeddings() is not None or model.can_generate() or not hasattr(model, base or "."):
        return []
    return [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]


def skipped_modules(model: PreTrainedModel, config: QosoraConfig) -> list[str]:
    """Return patterns of the modules that stay as they are: the output embedding, and what config and class name."""
    return modules_to_skip(model, config.modules_to_not_convert)


def replace_linears(model: PreTrainedModel, config: QosoraConfig, skip: list[str]) -> list[str]:
    """Replace linear layers by empty `QosoraLinear` on the meta device.

    Args:
        model: The model, on the meta device.
        config: Ranks and storage.
        skip: Patterns of module names to leave as they are, with all that is in them.

    Returns:
        The names of the replaced modules.

    Raises:
        ConfigError: If there is none.
    """
    routers = router_names(model)
    replaced = []
    for name, module in linear_layers(model).items():
        if name in routers or not _converts(name, skip):
            continue
        conv1d = isinstance(module, Conv1D)
        in_features, out_features = module.weight.shape if conv1d else module.weight.shape[::-1]
        new = QosoraLinear(
            in_features,
            out_features,
            module.bias is not None,
            rank=config.rank_of(name),
            compute_dtype=config.torch_compute_dtype,
            has_scale=config.scale is not None,
            fan_in_fan_out=conv1d,
            device="meta",
            dtype=module.weight.dtype,
            **config.storage_options(),
        )
        model.set_submodule(name, new)
        replaced.append(name)
    if not replaced:
        raise ConfigError(
            f"{Path(model.name_or_path) / CONFIG_NAME}: {type(model).__name__} has no linear layer left to decompose; "
            f"modules_to_not_convert is {skip}"
        )
    return replaced


def _replace_embeddings(model: PreTrainedModel, config: QosoraConfig) -> None:
    """Replace input embeddings and output layer by those whose matrix is quantized, empty, tied where the model is."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = names.get(id(embedding), "")
    ties = tied_weights(model)
    others = sorted(shared_weights(model) - {f"{name}.weight", f"{names.get(id(head))}.weight"})
    plain = head is None or (isinstance(head, nn.Linear) and names[id(head)] in linear_layers(model))
    if not isinstance(embedding, nn.Embedding) or not plain or any(end.endswith(".weight") for end in others):
        raise ConfigError(
            f"embeddings={config.embeddings!r}: {type(model).__name__} has no input embeddings of its own that nothing "
            "but its output layer shares; leave them in 16 bits: embeddings=None"
        )
    if config.embeddings == "4bit" and embedding.embedding_dim % config.blocksize:
        raise ConfigError(
            f"embeddings={config.embeddings!r} needs a hidden size that is a multiple of blocksize, got "
            f"{embedding.embedding_dim} and {config.blocksize}"
        )

    def stored(name: str, tokens: int) -> VocabularyMatrix:
        if config.embeddings == "8bit":
            return EightBitMatrix(embedding.embedding_dim, tokens, device="meta")
        return DecomposedMatrix(
            embedding.embedding_dim,
            tokens,
            bias=False,
            rank=config.rank_of(name),
            compute_dtype=config.torch_compute_dtype,
            has_scale=config.scale is not None,
            device="meta",
            **config.storage_options(),
        )

    kept = config.modules_to_not_convert or []
    tied = head is not None and f"{names[id(head)]}.weight" in ties
    if tied and not (_converts(name, kept) and _converts(names[id(head)], kept)):
        return
    shared = None
    if _converts(name, kept):
        converted = QosoraEmbedding.of(embedding, stored(name, embedding.num_embeddings))
        shared = converted if tied else None
    if isinstance(head, nn.Linear) and _converts(names[id(head)], kept):
        if tied:
            forget_tie(model, f"{names[id(head)]}.weight")
        own = None if tied else stored(names[id(head)], head.out_features)
        model.set_submodule(names[id(head)], QosoraHead(head, own, shared))


def _converts(name: str, skip: list[str]) -> bool:
    """Say whether no pattern means a module, nor one that it is in."""
    return all(should_convert_module(path, skip) for path in _paths(name))


def _paths(name: str) -> Iterator[str]:
    """Give the names of the modules that a module is in, and its own."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _unmatched_patterns(model: nn.Module, config: QosoraConfig) -> list[str]:
    """Return a sentence for every name in the config that means no layer: it is mistyped, or of another model."""
    linears = {*linear_layers(model)}
    if config.embeddings is not None and isinstance(model, PreTrainedModel):
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        linears |= {name for name, module in model.named_modules() if any(module is end for end in ends)}
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    return [
        f"rank_pattern[{pattern!r}] matches no linear layer of {type(model).__name__}, which has {kinds}"
        for pattern in config.rank_pattern
        if not any(matches_module(pattern, name) for name in linears)
    ] + [
        f"modules_to_not_convert: {pattern!r} matches no linear layer of {type(model).__name__}, which has {kinds}"
        for pattern in config.modules_to_not_convert or []
        if all(_converts(name, [pattern]) for name in linears)
    ]


def _warn_of_stacks(model: PreTrainedModel, skip: list[str]) -> None:
    if names := [name for name in stacked_names(model) if _converts(name, skip)]:
        kinds = ", ".join(sorted({type(model.get_submodule(name)).__name__ for name in names}))
        warnings.warn(
            f"{len(names)} modules of {type(model).__name__} ({kinds}), such as {names[0]!r}, hold matrices in stacks "
            "that cannot be taken apart, as experts of some models do: these stay in 16 bits",
            stacklevel=2,
        )

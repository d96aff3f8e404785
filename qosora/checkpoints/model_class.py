"""Which class of transformers a checkpoint is of: the one that it names, and not the one for all language models.

A text classifier, a translator or a model that sees has layers that a language model of the same configuration lacks.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from qosora.compat.transformers import built_from
from qosora.errors import CheckpointError

__all__ = [
    "REWARD", "TAGS", "TASKS", "TEXTS", "class_for_task", "empty_model", "model_class_of", "require_language_model",
    "sees", "task_of",
]  # fmt: skip

#: What a classifier does, in the words of transformers' pipelines; and a model that gives an answer its reward.
TEXTS, TAGS, REWARD = "text-classification", "token-classification", "reward"
TASKS = (TEXTS, TAGS, REWARD)
_CLASSES = {
    TEXTS: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    TAGS: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    REWARD: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}


def model_class_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """Return the class whose `from_pretrained` loads a checkpoint as what it was made for.

    Args:
        config: Of the checkpoint; `architectures` names the class.
        trust_remote_code: Whether it may be one that the checkpoint brings.

    Returns:
        A class of models; or one of transformers' automatic ones, which may take a class from the checkpoint.
        `AutoModelForCausalLM` where the configuration names none that transformers has for it.
    """
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, (list, tuple)) and names else None
    if not isinstance(name, str) or not name.isidentifier():
        return AutoModelForCausalLM
    brought = getattr(config, "auto_map", None) if trust_remote_code else None
    for auto, reference in (brought if isinstance(brought, dict) else {}).items():
        if auto.startswith("AutoModel") and str(reference).rpartition(".")[2] == name:
            return getattr(transformers, auto)
    found = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model:
        return AutoModelForCausalLM
    # Of some configurations it is another's, as InternLM 3 is a Llama.
    own = type(config) is getattr(found, "config_class", None)
    return found if own or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is found else AutoModelForCausalLM


def empty_model(config: PreTrainedConfig, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Return a model of a configuration, of the class that it names, on the device that is the default.

    Args:
        config: What to build.
        trust_remote_code: Whether to run model code that the checkpoint brings.
        **options: `dtype` and `attn_implementation`, as in `from_pretrained`.
    """
    found = model_class_of(config, trust_remote_code)
    if issubclass(found, PreTrainedModel):
        return built_from(found, config, **options)
    model: PreTrainedModel = found.from_config(config, trust_remote_code=trust_remote_code, **options)
    return model


def class_for_task(config: PreTrainedConfig, task: str) -> type[PreTrainedModel] | None:
    """Return the class for one of `TASKS` that takes a configuration, if transformers has one."""
    return next(iter(_classes_for_task(config, task)), None)


def task_of(config: PreTrainedConfig) -> str | None:
    """Return which of `TASKS` a model is made for; None for any other model."""
    found = model_class_of(config)
    for task in (TEXTS, TAGS):
        if found in _classes_for_task(config, task):
            return REWARD if task == TEXTS and config.num_labels == 1 else task
    return None


def sees(config: PreTrainedConfig) -> bool:
    """Say whether a model takes images beside text."""
    found = model_class_of(config)
    return issubclass(found, PreTrainedModel) and "pixel_values" in inspect.signature(found.forward).parameters


def _classes_for_task(config: PreTrainedConfig, task: str) -> tuple[type[PreTrainedModel], ...]:
    """Return the classes of one kind of configuration: asking for those of all would import every model."""
    mapping = _CLASSES[task]
    if type(config) not in mapping:
        return ()
    found = mapping[type(config)]
    return found if isinstance(found, tuple) else (found,)


def require_language_model(config: PreTrainedConfig, source: str, what: str) -> None:
    """Raise a `CheckpointError` if a model writes no text, or reads one text and writes another.

    Args:
        config: Of the model.
        source: Where it is, for the message.
        what: That needs a language model: `qosora train`.
    """
    found = model_class_of(config)
    if not issubclass(found, PreTrainedModel):
        return
    in_turn = hasattr(found, "prepare_inputs_for_generation")  # what diffuses a block of tokens has a way of its own
    if config.is_encoder_decoder or not found.can_generate() or not in_turn:
        raise CheckpointError(
            f"{source} is a {found.__name__}, and {what} takes language models that write on; "
            "use it from Python (docs/models.md)"
        )

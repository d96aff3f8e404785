"""Loading a base, with or without an adapter, and its tokenizer; from a local folder or a hub id."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from qosora.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    CONFIG_NAME,
    CheckpointReader,
    adapter_config,
    expanded,
    load_config,
    model_class_of,
    require_base,
    require_finite,
    require_intact,
    split_source,
)
from qosora.compat.peft import missing_keys_warning
from qosora.compat.transformers import says_other_shapes
from qosora.errors import CheckpointError, QosoraError, first_line
from qosora.layers import embedding_name, fast_dtype

__all__ = [
    "TABLE_OF_TOKENS", "fit_vocabulary", "load_adapted", "load_adapter", "load_base", "load_model", "load_processor",
    "load_tokenizer", "rows_brought",
]  # fmt: skip

#: What PEFT calls embeddings of which single rows are trained, below the module's name.
TABLE_OF_TOKENS = "token_adapter.base_layer.weight"
#: Errors of code that was given what it did not expect.
_ODD = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

_DAMAGED = "the file is damaged; get another copy"

logger = logging.getLogger("qosora")


def load_base(
    source: str | Path,
    *,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a qosora base.

    Args:
        source: Folder or hub id of a base, as `qosora quantize` or `save_pretrained` wrote it.
        config: Its configuration, where that has been read already.
        dtype: Of the parameters that are not decomposed; "auto" takes the checkpoint's.
        device_map: As in transformers; the current GPU, or the CPU without one, by default.
        attn_implementation: As in transformers, which chooses by default.
        trust_remote_code: Whether to run model code that the checkpoint brings.
        **kwargs: Handed to `from_pretrained` of the class that its configuration names.

    Raises:
        CheckpointError: If `source` is no qosora base.
    """
    source = expanded(source)
    read = config or load_config(source, trust_remote_code=trust_remote_code)
    require_base(source, read)
    if Path(source).is_dir():
        require_intact(Path(source))
    if config is not None or not kwargs:  # else transformers reads it again, as some of kwargs may be values for it
        kwargs["config"] = read
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    try:
        model: PreTrainedModel
        model, info = model_class_of(read, trust_remote_code).from_pretrained(
            str(source),
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    except QosoraError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source}: {first_line(error)}; get another copy") from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if not says_other_shapes(error):
            raise CheckpointError(
                f"{source}: the model of its {CONFIG_NAME} cannot be built ({first_line(error)})"
            ) from error
        raise CheckpointError(
            f"{source}: the tensors have other shapes than config.json makes them (transformers names them above); "
            "weights and config belong to different bases"
        ) from error
    except _ODD as error:
        if isinstance(error, ValueError) and attn_implementation is not None:  # which may be what is wrong
            raise
        # Something that transformers did not expect of a configuration or a tensor.
        raise CheckpointError(
            f"{source}: transformers cannot build the model of its {CONFIG_NAME} and tensors ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    if missing := sorted(info["missing_keys"]):  # which transformers has drawn at random
        raise CheckpointError(
            f"{source}: {len(missing)} tensors that the model needs are not there, among them {missing[0]}; get the "
            "whole base"
        )
    _refuse_impossible(str(source), model.named_parameters())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(getattr(model, "generation_config", None), name, None)
        if any(
            type(i) is not int or not -1 <= i < 2**31
            for i in (value if isinstance(value, list) else [] if value is None else [value])
        ):
            raise CheckpointError(
                f"{source}/generation_config.json: {name} must be a token id or several, got {value!r}"
            )
    return model


def _refuse_impossible(source: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise CheckpointError if a tensor holds what none can: NaN, infinity, or a scale that is not above zero."""
    for name, tensor in tensors:
        if tensor.is_meta:
            continue
        require_finite(f"{source}: {name}", tensor.detach(), _DAMAGED)
        if name.endswith(".c") and not tensor.min() > 0:
            raise CheckpointError(f"{source}: {name} holds a scale that is not above zero: {_DAMAGED}")


def load_model(source: str | Path, *, base: str | Path | None = None, **kwargs: Any) -> Any:
    """Load a base, or a base with an adapter, for inference.

    Args:
        source: A base, or an adapter; folder or hub id.
        base: The adapter's base, where it is no longer where the adapter's config says.
        **kwargs: Handed to `load_base`. On a CPU that is slow in the base's 16 bits, the dtype is float32 unless it is
            given.

    Returns:
        A `PreTrainedModel` or `PeftModel` in evaluation mode.

    Raises:
        CheckpointError: If one of them cannot be loaded.
        FingerprintError: If they do not belong together.
    """
    return load_adapted(*split_source(source, base), **kwargs)


def load_adapted(base: str, adapter: str | None, **kwargs: Any) -> Any:
    """Do as `load_model` with what `split_source` makes of its arguments."""
    recorded = None if adapter is None else adapter_config(adapter).base_model_name_or_path
    try:
        if kwargs.get("dtype", "auto") == "auto" and _on_cpu(kwargs.get("device_map")):
            kwargs["dtype"] = _quick_dtype(load_config(base, trust_remote_code=kwargs.get("trust_remote_code", False)))
        model = load_base(base, **kwargs)
    except CheckpointError as error:
        if base != recorded:
            raise
        raise CheckpointError(
            f"{error}. ({base} is the base that {adapter}/{ADAPTER_CONFIG} names; if it has moved, give its new place "
            "as the base)"
        ) from error
    return (model if adapter is None else load_adapter(model, adapter)).eval()


def _on_cpu(device_map: Any) -> bool:
    return not torch.cuda.is_available() if device_map is None else str(device_map) in ("cpu", "{'': 'cpu'}")


def _quick_dtype(config: PreTrainedConfig) -> torch.dtype | str:
    """Return the dtype to compute in on this CPU, and say so where it is not the base's."""
    stored = config.dtype
    if not isinstance(stored, torch.dtype) or (quick := fast_dtype(stored)) == stored:
        return "auto"
    logger.info(
        "computing in float32, as this CPU is slow in %s; give a dtype to have another", str(stored).split(".")[-1]
    )
    return quick


def load_adapter(
    model: PreTrainedModel | PeftModel, adapter: str | Path, *, name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Put an adapter on its base.

    Args:
        model: The base, or the base with other adapters; it is left with the one in use that was.
        adapter: Folder or hub id.
        name: What PEFT calls it.
        is_trainable: Whether to train on.

    Raises:
        CheckpointError: If it is not whole.
        FingerprintError: If it was trained on another base.
    """
    if Path(expanded(adapter)).is_dir():
        require_intact(Path(expanded(adapter)))
    fit_vocabulary(model, adapter)
    own = {id(tensor) for tensor in model.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", missing_keys_warning(), UserWarning)
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(expanded(adapter), adapter_name=name, is_trainable=is_trainable)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(
                    model, expanded(adapter), adapter_name=name, is_trainable=is_trainable
                )
        except (QosoraError, torch.OutOfMemoryError):
            raise
        except (OSError, RuntimeError, UserWarning, SafetensorError, *_ODD) as error:
            raise CheckpointError(
                f"{adapter}: not a whole adapter ({first_line(error)[:200]}); get another copy"
            ) from error
    added = ((name, tensor) for name, tensor in adapted.named_parameters() if id(tensor) not in own)
    _refuse_impossible(str(adapter), added)
    return adapted


def fit_vocabulary(model: PreTrainedModel, adapter: str | Path) -> None:
    """Give a model's embeddings as many rows as those that an adapter brings, if it brings any."""
    name, folder = embedding_name(model), Path(expanded(adapter))
    if name is None or not (folder / f"{ADAPTER_STEM}.safetensors").is_file():
        return
    with CheckpointReader(folder, ADAPTER_STEM) as reader:
        rows = rows_brought(reader, name)
    if rows not in (None, len(model.get_submodule(name).weight)):
        model.resize_token_embeddings(rows, mean_resizing=False)


def rows_brought(reader: CheckpointReader, embedding: str) -> int | None:
    """Return how many rows the embeddings have that an adapter brings whole, or None.

    Args:
        reader: Of the adapter.
        embedding: Name of the module in the model.
    """
    for end in ("weight", TABLE_OF_TOKENS):
        if (key := f"base_model.model.{embedding}.{end}") in reader:
            return reader.shape(key)[0]
    return None


def load_processor(source: str | Path, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """Return what makes tokens and pixels for a model that sees.

    Raises:
        CheckpointError: There is none.
    """
    try:
        found = AutoProcessor.from_pretrained(expanded(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # its files may be of any form
        raise CheckpointError(f"{source}: no processor of images there ({first_line(error)})") from error
    if not isinstance(found, ProcessorMixin):  # a tokenizer, where no other files are
        raise CheckpointError(
            f"{source}: no processor of images there; copy the model's preprocessor_config.json and "
            "processor_config.json into the folder"
        )
    return found


def load_tokenizer(*sources: str | Path | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the first of some folders or hub ids that has one.

    Raises:
        CheckpointError: If none has.
    """
    reasons = []
    for source in sources:
        if source is None:
            continue
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                expanded(source), trust_remote_code=trust_remote_code
            )
            tokenizer("a")  # some files of an odd form are found only when it is used
            return tokenizer
        except Exception as error:  # a tokenizer's files may be of any form
            reasons.append(f"{source}: {first_line(error)}")
    raise CheckpointError("no tokenizer found; copy the model's tokenizer files into the folder. " + "; ".join(reasons))

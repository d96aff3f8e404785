"""Loading a base, with or without an adapter, and its tokenizer; from a local folder or a hub id."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qosora.config import QUANT_METHOD, OsoraConfig
from qosora.errors import CheckpointError, QosoraError

__all__ = ["adapter_config", "load_base", "load_model", "load_tokenizer", "quantization_of", "split_source"]

ADAPTER_CONFIG = "adapter_config.json"


def quantization_of(source: str | Path, *, trust_remote_code: bool = False) -> dict[str, Any] | None:
    """Return the quantization config of a checkpoint as stored, or None if it has none.

    Raises:
        CheckpointError: If there is no model at `source`.
    """
    try:
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: no model there that transformers can load ({_first_line(error)})") from error
    found = getattr(config, "quantization_config", None)
    return dict(found) if found else None


def load_base(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a qosora base.

    Args:
        source: Folder or hub id of a base, as `qosora quantize` or `save_pretrained` wrote it.
        dtype: Of the parameters that are not decomposed; "auto" takes the checkpoint's.
        device_map: As in transformers; the current GPU, or the CPU without one, by default.
        trust_remote_code: Whether to run model code that the checkpoint brings.
        **kwargs: Handed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: If `source` is no qosora base.
    """
    stored = quantization_of(source, trust_remote_code=trust_remote_code)
    if stored is None or stored.get("quant_method") != QUANT_METHOD:
        kind = "an ordinary checkpoint" if stored is None else f"quantized with {stored.get('quant_method')!r}"
        raise CheckpointError(
            f"{source} is {kind}, not a qosora base. Make one of the original weights: qosora quantize SRC OUT"
        )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **kwargs
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{source}: {_first_line(error)}; get another copy") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError(
            f"{source}: the tensors have other shapes than config.json makes them (transformers names them above); "
            "weights and config belong to different bases"
        ) from error
    return model


def adapter_config(adapter: str | Path) -> OsoraConfig:
    """Return the config of an adapter.

    Raises:
        CheckpointError: If there is none, or it is not OSoRA's.
    """
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{adapter}: no adapter that PEFT can load ({_first_line(error)})") from error
    if not isinstance(config, OsoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise CheckpointError(f"{adapter}: an adapter of type {kind}, not one of qosora's")
    return config


def split_source(source: str | Path, base: str | Path | None = None) -> tuple[str, str | None]:
    """Tell what a user's MODEL is: return (base, adapter or None).

    Args:
        source: A base, or the folder of an adapter.
        base: The adapter's base, where it is no longer where the adapter's config says.
    """
    if not (Path(source) / ADAPTER_CONFIG).is_file():
        return str(base or source), str(source) if base else None
    recorded = adapter_config(source).base_model_name_or_path
    if base is None and not recorded:
        raise CheckpointError(f"{source}/{ADAPTER_CONFIG} names no base; give it with --base")
    return str(base or recorded), str(source)


def load_model(source: str | Path, *, base: str | Path | None = None, **kwargs: Any) -> Any:
    """Load a base, or a base with an adapter, for inference.

    Args:
        source: A base, or the folder of an adapter.
        base: The adapter's base, where it is no longer where the adapter's config says.
        **kwargs: Handed to `load_base`.

    Returns:
        A `PreTrainedModel` or `PeftModel` in evaluation mode.

    Raises:
        CheckpointError: If one of them cannot be loaded.
        FingerprintError: If they do not belong together.
    """
    found, adapter = split_source(source, base)
    if adapter is not None:
        adapter_config(adapter)
    try:
        model = load_base(found, **kwargs)
    except CheckpointError as error:
        if adapter is None or base is not None:
            raise
        raise CheckpointError(
            f"{error}. ({found} is the base that {adapter}/{ADAPTER_CONFIG} names; if it has moved, give its new place "
            "as the base)"
        ) from error
    return (model if adapter is None else _load_adapter(model, adapter)).eval()


def _load_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            return PeftModel.from_pretrained(model, adapter)
        except QosoraError:
            raise
        except (OSError, ValueError, UserWarning, SafetensorError) as error:
            raise CheckpointError(
                f"{adapter}: not a whole adapter ({_first_line(error)[:200]}); get another copy"
            ) from error


def load_tokenizer(*sources: str | Path | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the first of some folders or hub ids that has one.

    Raises:
        CheckpointError: If none has.
    """
    reasons = []
    for source in filter(None, sources):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(source), trust_remote_code=trust_remote_code
            )
            return tokenizer
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reasons.append(f"{source}: {_first_line(error)}")
    raise CheckpointError("no tokenizer found; copy the model's tokenizer files into the folder. " + "; ".join(reasons))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""What a folder or hub id holds, from its configuration alone: a base, an adapter, an ordinary or quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig, PreTrainedConfig

from qosora.checkpoints.folders import expanded
from qosora.checkpoints.names import ADAPTER_CONFIG
from qosora.config import QUANT_METHOD, OsoraConfig
from qosora.errors import CheckpointError, first_line

__all__ = ["adapter_config", "base_storage", "load_config", "quantization_in", "require_base", "split_source"]


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of the model at a folder or hub id.

    Raises:
        CheckpointError: If there is none.
    """
    try:
        return AutoConfig.from_pretrained(expanded(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: no model there that transformers can load ({first_line(error)})") from error


def quantization_in(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a model is quantized, by its configuration or the content of its config.json; None if it is not."""
    found = (config if isinstance(config, Mapping) else vars(config)).get("quantization_config")
    return dict(found if isinstance(found, Mapping) else found.to_dict()) if found else None


def base_storage(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a base is stored, the arguments of its `QosoraConfig`; None if the model is no base."""
    stored = quantization_in(config)
    return stored if stored is not None and stored.get("quant_method") == QUANT_METHOD else None


def require_base(source: str | Path, config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return how a base is stored, as `base_storage`.

    Args:
        source: Folder or hub id, for the message.
        config: As in `quantization_in`.

    Raises:
        CheckpointError: If it is no base, saying what it is instead.
    """
    if (stored := base_storage(config)) is not None:
        return stored
    other = quantization_in(config)
    kind = "an ordinary checkpoint" if other is None else f"quantized with {other.get('quant_method')!r}"
    raise CheckpointError(
        f"{source} is {kind}, not a qosora base. Make one of the original weights: qosora quantize SRC OUT"
    )


def adapter_config(adapter: str | Path) -> OsoraConfig:
    """Return the config of an adapter.

    Raises:
        CheckpointError: If there is none, or it is not OSoRA's.
    """
    try:
        config = PeftConfig.from_pretrained(expanded(adapter))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{adapter}: no adapter that PEFT can load ({first_line(error)})") from error
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
    source, base = expanded(source), None if base is None else expanded(base)
    if not (Path(source) / ADAPTER_CONFIG).is_file():
        return base or source, source if base else None
    recorded = adapter_config(source).base_model_name_or_path
    if base is None and not recorded:
        raise CheckpointError(f"{source}/{ADAPTER_CONFIG} names no base; give it with --base")
    return str(base or recorded), source

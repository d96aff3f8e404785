"""What a folder or hub id holds, from its configuration alone: a base, an adapter, an ordinary or quantized model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, PreTrainedConfig

from qosora.checkpoints.folders import expanded, local_folder, read_json
from qosora.checkpoints.names import ADAPTER_CONFIG, CONFIG_NAME
from qosora.config import QUANT_METHOD, QosoraConfig
from qosora.errors import CheckpointError, ConfigError, QosoraError, first_line
from qosora.places import place_of

if TYPE_CHECKING:
    from qosora.config import OsoraConfig

__all__ = ["adapter_config", "base_storage", "load_config", "quantization_in", "require_base", "split_source"]

#: Of layers, heads or experts: more than any model has.
_LARGEST_COUNT = 2**17


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of the model at a folder or hub id.

    Raises:
        CheckpointError: If there is none.
    """
    file = Path(expanded(source)) / CONFIG_NAME
    if file.is_file():
        _require_plausible(file, read_json(file))
    try:
        return AutoConfig.from_pretrained(expanded(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # a class of transformers may fail in any way on what it did not expect
        where = file if file.is_file() else source
        raise CheckpointError(
            f"{where}: no model there that transformers can load ({type(error).__name__}: {first_line(error)})"
        ) from error


def _require_plausible(file: Path, values: Mapping[str, Any], within: str = "") -> None:
    """Refuse counts that no model has: building one with a billion layers would not end."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _require_plausible(file, value, f"{within}{key}.")
        elif type(value) is int and re.search(r"layer|block|expert|head", key) and abs(value) > _LARGEST_COUNT:
            raise CheckpointError(f"{file}: {within}{key} is {value}, and no model has so many; get another copy of it")


def quantization_in(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a model is quantized, by its configuration or the content of its config.json; None if it is not."""
    found = (config if isinstance(config, Mapping) else vars(config)).get("quantization_config")
    if not found:
        return None
    if not isinstance(found, Mapping) and not hasattr(found, "to_dict"):
        raise CheckpointError(f"{CONFIG_NAME}: quantization_config must be an object, got {found!r}; get another copy")
    return dict(found if isinstance(found, Mapping) else found.to_dict())


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
        CheckpointError: If it is no base, saying what it is instead, or says of itself what cannot be.
    """
    if (stored := base_storage(config)) is not None:
        try:
            QosoraConfig.from_dict(stored)
        except CheckpointError as error:
            raise CheckpointError(f"{source}/{CONFIG_NAME}: {error}") from None
        except ConfigError as error:
            raise CheckpointError(
                f"{source}/{CONFIG_NAME}: quantization_config: {'; '.join(error.problems)}; get another copy of it"
            ) from None
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
    from peft import PeftConfig  # which takes seconds, and most of what this module is for needs none

    from qosora.config import OsoraConfig

    file = Path(expanded(adapter)) / ADAPTER_CONFIG
    if file.is_file():
        read_json(file)
    try:
        config = PeftConfig.from_pretrained(expanded(adapter))
    except QosoraError as error:
        raise CheckpointError(f"{file.parent}: {error}") from None
    except Exception as error:  # see load_config
        where = file if file.is_file() else adapter
        raise CheckpointError(
            f"{where}: no adapter that PEFT can load ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(config, OsoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise CheckpointError(f"{adapter}: an adapter of type {kind}, not one of qosora's")
    for name in ("base_model_name_or_path", "base_fingerprint"):
        if not isinstance(value := getattr(config, name), str | None):
            raise CheckpointError(f"{file}: {name} must be text, got {value!r}; get another copy of it")
    if config.base_model_name_or_path:
        config.base_model_name_or_path = place_of(
            config.base_model_name_or_path, file.parent, key=config.base_fingerprint
        )
    return config


def _is_adapter_there(name: str) -> bool:
    """Say whether a name is the hub id of an adapter; False also where nothing can be known of it."""
    if Path(name).is_absolute() or name.startswith("."):
        return False
    try:
        hf_hub_download(name, ADAPTER_CONFIG)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return False
    return True


def split_source(source: str | Path, base: str | Path | None = None) -> tuple[str, str | None]:
    """Tell what a user's MODEL is: return (base, adapter or None).

    Args:
        source: A base, or an adapter: a folder or a hub id, of which an adapter's is downloaded.
        base: The adapter's base, where it is no longer where the adapter's config says.
    """
    source, base = expanded(source), None if base is None else expanded(base)
    if base is None and not Path(source).exists() and _is_adapter_there(source):
        source = str(local_folder(source))
    if not (Path(source) / ADAPTER_CONFIG).is_file():
        return base or source, source if base else None
    recorded = adapter_config(source).base_model_name_or_path
    if base is None and not recorded:
        raise CheckpointError(f"{source}/{ADAPTER_CONFIG} names no base; give it with --base")
    if base is None and str(recorded).startswith(".") and not (Path(str(recorded)) / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{source}/{ADAPTER_CONFIG} names the base {recorded}, and no such folder is there; give its place with "
            "--base"
        )
    return str(base or recorded), source

"""PEFT: which modules are adapted, how a LoRA of experts is stored, QLoRA's layers, a warning."""

from __future__ import annotations

from typing import Any

from qosora.compat.names import found, uses

_UTILS = "peft.tuners.tuners_utils"

_FOUND = found(
    __name__,
    {
        # Says which modules a config targets: what is adapted on loading must be what an export looks for.
        "check_target_module_exists": f"{_UTILS}.check_target_module_exists(config, key)",
        # Drops adapters that are merged already, with PEFT's warning.
        "check_adapters_to_merge": f"{_UTILS}.check_adapters_to_merge(module, adapter_names)",
        # Makes targets of a LoRA of transformers 4's experts those of stacked ones, in place.
        "convert_peft_config_for_transformers": (
            "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"
            "(peft_config, model, conversions)"
        ),
    },
)


def __getattr__(name: str) -> Any:
    return _FOUND(name)


@uses("peft.tuners.lora.bnb.Linear4bit")
def load_bnb_layers() -> None:
    """Import PEFT's layers for bitsandbytes' ones, in an order that works: these first, then `get_peft_model`."""


@uses("peft.tuners.lora.LoraModel._create_and_replace: is_loaded_in_4bit")
def mark_as_4bit(model: Any) -> None:
    """Have a LoRA take a model's layers for bitsandbytes' own, as `from_pretrained` marks one that it quantizes."""
    model.is_loaded_in_4bit = True


@uses("peft.PeftModel.from_pretrained: Found missing adapter keys")
def missing_keys_warning() -> str:
    """Return how PEFT's warning begins of an adapter that is not whole."""
    return "Found missing adapter keys"

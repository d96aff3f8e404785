"""Methods and attributes of other packages' classes that our classes override or set, and tables with entries of ours.

An override stays silent when what it overrides is gone: it is never called. So each is an entry here, with the
parameters that it is called with.
"""

from __future__ import annotations

from qosora.compat.names import ENTRIES

__all__ = ["HOOKS", "TABLES"]

_TUNER, _LAYER = "peft.tuners.tuners_utils.BaseTuner", "peft.tuners.tuners_utils.BaseTunerLayer"
_QUANTIZER = "transformers.quantizers.base.HfQuantizer"

#: Our class -> entries of what it overrides, sets or calls of its bases.
HOOKS: dict[str, tuple[str, ...]] = {
    "qosora.adapter.OsoraModel": (
        f"{_TUNER}.inject_adapter(model, adapter_name)",
        f"{_TUNER}._check_new_adapter_config(config)",
        "peft.PeftModel._enable_peft_forward_hooks: _enable_peft_forward_hooks",
        f"{_TUNER}._prepare_adapter_config(peft_config, model_config)",
        f"{_TUNER}._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)",
        f"{_TUNER}._replace_module(parent, child_name, new_module, child)",
        f"{_TUNER}: target_module_mapping",
        f"{_TUNER}: tuner_layer_cls",
        f"{_TUNER}: prefix",
    ),
    "qosora.adapter.OsoraLayer": (
        f"{_LAYER}._move_adapter_to_device_of_base_layer(adapter_name, device)",
        f"{_LAYER}: adapter_layer_names",
        f"{_LAYER}: _disable_adapters",
        f"{_LAYER}: _active_adapter",
        f"{_LAYER}: merged_adapters",
        f"{_LAYER}.set_adapter(adapter_names, inference_mode)",
        "torch.nn.Module._apply(fn, recurse)",
    ),
    "qosora.layers.linear.QosoraLinear": (
        "torch.nn.Module._apply(fn, recurse)",
        "torch.nn.Module._replicate_for_data_parallel",
        "torch.nn.Module: _parameters",
    ),
    "qosora.base.quantizer.QosoraHfQuantizer": (
        f"{_QUANTIZER}._process_model_before_weight_loading(model)",
        f"{_QUANTIZER}._process_model_after_weight_loading(model)",
        f"{_QUANTIZER}._dequantize(model, dtype)",
        f"{_QUANTIZER}.update_weight_conversions(weight_conversions, model)",
        f"{_QUANTIZER}.param_needs_quantization(model, param_name)",
        f"{_QUANTIZER}.get_quantize_ops",
        f"{_QUANTIZER}.update_device_map(device_map)",
        f"{_QUANTIZER}.validate_environment",
        f"{_QUANTIZER}.is_serializable",
        f"{_QUANTIZER}.is_trainable",
    ),
    "qosora.training.trainer._OfVectors": (
        "transformers.Trainer._save(output_dir, state_dict)",
        "transformers.Trainer: optimizer_cls_and_kwargs",
        *(f"trl.{name}Trainer.create_model_card" for name in ("SFT", "DPO", "KTO", "GRPO")),
    ),
    "qosora.training.trainer.QosoraTrainer": ("transformers.Trainer._get_train_sampler(train_dataset)",),
}

#: Tables of classes by what a config names, which `qosora.register` fills; and a prefix of tensors' names.
TABLES = {
    "configs": "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING",
    "quantizers": "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING",
    "adapter configs": "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING",
    "tuners": "peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING",
    "prefixes": "peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING",
}

ENTRIES.extend(entry for entries in (*HOOKS.values(), TABLES.values()) for entry in entries)

"""The transformers side of the base: `from_pretrained` decomposes, saves and loads it like any quantized model.

On an ordinary checkpoint every linear layer but the output embedding becomes a `QosoraLinear`, and each weight is
decomposed as it is read, on the device where it will live: the full model is never held. `save_pretrained` writes the
packed tensors and the config; loading that needs no configuration and gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from qosora.config import QUANT_METHOD, QosoraConfig
from qosora.errors import CheckpointError, ConfigError
from qosora.factorize import factorize
from qosora.linear import QosoraLinear, qosora_modules

__all__ = ["QosoraHfQuantizer", "replace_linears"]


def replace_linears(model: nn.Module, config: QosoraConfig, skip: list[str]) -> list[str]:
    """Replace linear layers by empty `QosoraLinear` on the meta device.

    Args:
        model: The model, on the meta device.
        config: Ranks and storage.
        skip: Patterns of module names to leave as they are.

    Returns:
        The names of the replaced modules.

    Raises:
        ConfigError: If there is none.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        conv1d = isinstance(module, Conv1D)
        if not (conv1d or type(module) is nn.Linear) or not should_convert_module(name, skip):
            continue
        in_features, out_features = module.weight.shape if conv1d else (module.in_features, module.out_features)
        new = QosoraLinear(
            in_features,
            out_features,
            module.bias is not None,
            rank=config.rank_of(name),
            compute_dtype=config.torch_compute_dtype,
            fan_in_fan_out=conv1d,
            device="meta",
            dtype=module.weight.dtype,
            **config.storage_options(),
        )
        model.set_submodule(name, new)
        replaced.append(name)
    if not replaced:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer left to decompose; modules_to_not_convert is {skip}"
        )
    return replaced


class _Factorize(ConversionOps):
    """Decomposes one weight of an ordinary checkpoint into the parameters of its `QosoraLinear`."""

    def __init__(self, quantizer: QosoraHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_: Any) -> dict[str, torch.Tensor]:
        if model is None:
            raise CheckpointError("decomposing needs the model that the weights are for")
        result = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            result.update(
                {
                    f"{name.removesuffix('weight')}{key}": tensor
                    for key, tensor in self._state(name, module, weight).items()
                }
            )
        return result

    def _state(self, name: str, module: QosoraLinear, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        config = self.quantizer.quantization_config
        weight = weight.T if module.fan_in_fan_out else weight
        expected = (module.out_features, module.in_features)
        if tuple(weight.shape) != expected:
            raise CheckpointError(f"{name}: the model wants shape {expected}, the checkpoint has {tuple(weight.shape)}")
        return module.state_of(factorize(weight, module.rank, name=name, **config.factorize_options()))


class QosoraHfQuantizer(HfQuantizer):
    """Plugs `QosoraConfig` into `from_pretrained` and `save_pretrained`."""

    quantization_config: QosoraConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what would fail deep inside the loader."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "a qosora base cannot be offloaded to disk: it is a quarter of the model's size and is needed in every "
                "step. Take 'disk' out of device_map"
            )

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Choose the current GPU where there is one and nothing was asked for: CPU decomposition is slow."""
        if device_map is None:
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Say whether a checkpoint's tensor is a weight to decompose."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QosoraLinear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that decomposes a weight."""
        return _Factorize(self)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        replace_linears(model, config, skip)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in qosora_modules(model).values():
            module.requires_grad_(False)  # the loader makes every float parameter trainable
        return model

    def is_serializable(self) -> bool:
        """Say that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that adapters can be trained on it."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # config.dtype is a str after save_pretrained
        dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        for name, module in qosora_modules(model).items():
            model.set_submodule(name, _plain_linear(module, dtype))
        return model


@torch.no_grad()
def _plain_linear(module: QosoraLinear, dtype: torch.dtype | None) -> nn.Module:
    """Return the `nn.Linear` or `Conv1D` that a layer was made of, with its dequantized weight."""
    weight = module.dequantize().to(dtype or torch.float32)
    with torch.device("meta"):
        if module.fan_in_fan_out:
            new: nn.Module = Conv1D(module.out_features, module.in_features)
            weight = weight.T.contiguous()
        else:
            new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    new.weight = nn.Parameter(weight)
    if module.bias is not None:
        new.bias = nn.Parameter(module.bias.detach().to(weight.dtype))
    return new


AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = QosoraHfQuantizer

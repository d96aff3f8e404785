"""The transformers side of the base: `from_pretrained` decomposes, saves and loads it like any quantized model.

On an ordinary checkpoint every linear layer but the output embedding and routers becomes a `QosoraLinear`, the
projections of each expert of a mixture among them, and each weight is decomposed as it is read, on the device where it
will live: the full model is never held. `save_pretrained` writes the packed tensors and the config; loading that needs
no configuration and gives the same bytes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, ItemsView
from itertools import groupby
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightTransform
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from qosora.config import QUANT_METHOD, QosoraConfig, matches_module
from qosora.errors import CheckpointError, ConfigError
from qosora.experts import LinearExperts, router_names, split_experts, stack_experts, stacked_names, without_stacking
from qosora.factorize import factorize
from qosora.linear import QosoraLinear, qosora_modules

__all__ = ["QosoraHfQuantizer", "replace_linears"]


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
    for name, module in _linears(model).items():
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


def _linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}


def _converts(name: str, skip: list[str]) -> bool:
    """Say whether no pattern means a module, nor one that it is in."""
    parts = name.split(".")
    return all(should_convert_module(".".join(parts[:end]), skip) for end in range(1, len(parts) + 1))


def _unmatched_patterns(model: nn.Module, config: QosoraConfig) -> list[str]:
    """Return a sentence for every name in the config that means no layer: it is mistyped, or of another model."""
    linears = _linears(model)
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


def _few_patterns(names: set[str], others: set[str], exact: int = 0) -> set[str]:
    r"""Return regular expressions that match these names and none of the others, as few as `\d+` for numbers allows.

    The loader searches each tensor's name for all of them: with one for each expert that would take minutes.

    Args:
        names: To match.
        others: Not to match.
        exact: How many of a name's numbers, from the left, to leave as they are.
    """

    def general(name: str) -> str:
        parts = re.split(r"(\d+)", name)
        return "".join(r"\d+" if i % 2 and i // 2 >= exact else re.escape(part) for i, part in enumerate(parts))

    taken = {general(name) for name in others}
    patterns = set()
    for pattern, group in groupby(sorted(names, key=general), general):
        patterns |= {pattern} if pattern not in taken else _few_patterns(set(group), others, exact + 1)
    return patterns


class _Deferred(dict[str, torch.Tensor]):
    """A result that is computed when it is read.

    The loader turns an error of `convert` into text for a report, goes on with all other weights, and ends in a
    RuntimeError that does not say what was wrong. It reads the result outside of that: an error there reaches the
    caller, at once.
    """

    def __init__(self, compute: Callable[[], dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self._compute = compute

    def items(self) -> ItemsView[str, torch.Tensor]:  # type: ignore[override]
        return self._compute().items()


class _Factorize(ConversionOps):
    """Decomposes one weight of an ordinary checkpoint into the parameters of its `QosoraLinear`."""

    def __init__(self, config: QosoraConfig) -> None:
        self.config = config

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_: Any) -> dict[str, torch.Tensor]:
        """Return the parameters of the layers that the weights in `input_dict` belong to, by name."""
        return _Deferred(lambda: self._states(input_dict, model))

    def _states(self, weights: dict[str, Any], model: nn.Module | None) -> dict[str, torch.Tensor]:
        if model is None:
            raise CheckpointError("decomposing needs the model that the weights are for")
        result = {}
        for name, value in weights.items():
            module, _ = get_module_from_name(model, name)
            state = self._state(name, module, value[0] if isinstance(value, list) else value)
            result.update({f"{name.removesuffix('weight')}{key}": tensor for key, tensor in state.items()})
        return result

    def _state(self, name: str, module: QosoraLinear, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = weight.T if module.fan_in_fan_out else weight
        expected = (module.out_features, module.in_features)
        if tuple(weight.shape) != expected:
            raise CheckpointError(
                f"{name}: config.json makes it {expected}, the checkpoint has {tuple(weight.shape)}; "
                "config and weights belong to different models"
            )
        return module.state_of(factorize(weight, module.rank, name=name, **self.config.factorize_options()))


class QosoraHfQuantizer(HfQuantizer):
    """Plugs `QosoraConfig` into `from_pretrained` and `save_pretrained`."""

    quantization_config: QosoraConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what would fail deep inside the loader."""
        device_map = kwargs.get("device_map")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places:
            raise ConfigError(
                "a qosora base cannot be offloaded to disk: it is a quarter of the model's size and is needed in every "
                "step. Take 'disk' out of device_map"
            )
        if "cpu" in places and len(places) > 1:  # adapters would compute with weights that are not there
            raise ConfigError(
                "a qosora base cannot be offloaded from a GPU to the CPU in part, as device_map (or 'auto', where the "
                "GPU is too small) has it. Free GPU memory, or put all of it on one side: device_map=0 or 'cpu'"
            )

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Choose the current GPU where there is one and nothing was asked for: CPU decomposition is slow."""
        if device_map is None:
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Say whether a checkpoint's tensor is a weight to decompose."""
        module, name = get_module_from_name(model, param_name)
        # Of a base, too, the loader would ask, and not compare the shape of a tensor that "needs quantization".
        return not self.pre_quantized and isinstance(module, QosoraLinear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that decomposes a weight."""
        return _Factorize(self.quantization_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        split_experts(model)
        skip = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
        )
        if not self.pre_quantized:
            if problems := _unmatched_patterns(model, config):
                raise ConfigError(problems)
            _warn_of_stacks(model, skip)
        replaced = {f"{name}.weight" for name in replace_linears(model, config, skip)}
        if not any(isinstance(module, LinearExperts) and qosora_modules(module) for module in model.modules()):
            stack_experts(model)
        if not self.pre_quantized:
            # Else the loader would round float32 weights to the model's dtype before they are decomposed.
            kept = ((n, m) for n, m in model.named_modules() if not isinstance(m, QosoraLinear))
            self._read_in_float32 = _few_patterns(replaced, {f"{n}.{key}" for n, m in kept for key in m._parameters})
            model._keep_in_fp32_modules_strict = self._read_in_float32.union(model._keep_in_fp32_modules_strict or ())

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Leave experts as they are on disk, where their matrices are layers of the model."""
        return without_stacking(super().update_weight_conversions(weight_conversions, model), model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _refuse_missing(model)
        if not self.pre_quantized:
            model._keep_in_fp32_modules_strict -= self._read_in_float32
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
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ConfigError("the model has adapters: dequantize what merge_and_unload() or unload() returns")
        dtype, loaded_dtype = _torch_dtype(dtype), _torch_dtype(model.config.dtype)
        for name, module in qosora_modules(model).items():
            model.set_submodule(name, _plain_linear(module, dtype))
        stack_experts(model)
        if dtype not in (None, loaded_dtype):  # the user's choice: embeddings and norms must follow
            model.to(dtype)
            model.config.dtype = dtype
        return model


def _refuse_missing(model: PreTrainedModel) -> None:
    """Raise CheckpointError where a decomposed layer's tensors were not all in the checkpoint.

    The loader only logs that, and leaves uninitialised memory in them.
    """
    if hasattr(model, "hf_device_map"):  # spread over devices: tensors that were moved have lost the loader's mark
        return
    missing = [
        f"{name}.{key}"
        for name, module in qosora_modules(model).items()
        for key, param in module.named_parameters(recurse=False)
        if not getattr(param, "_is_hf_initialized", False)
    ]
    if missing:
        cure = "get the whole checkpoint"
        if any(isinstance(module, LinearExperts) for module in model.modules()):
            cure += (
                ". If it holds all experts of a layer in one tensor, save it anew with transformers, which writes one "
                "for each, or leave them in 16 bits: modules_to_not_convert=['experts']"
            )
        raise CheckpointError(
            f"{model.config.name_or_path}: {len(missing)} tensors that the model needs are not in the checkpoint, "
            f"among them {missing[0]!r}; {cure}"
        )


def _warn_of_stacks(model: PreTrainedModel, skip: list[str]) -> None:
    if names := [name for name in stacked_names(model) if _converts(name, skip)]:
        kinds = ", ".join(sorted({type(model.get_submodule(name)).__name__ for name in names}))
        warnings.warn(
            f"{len(names)} modules of {type(model).__name__} ({kinds}), such as {names[0]!r}, hold matrices in stacks "
            "that cannot be taken apart, as experts of some models do: these stay in 16 bits",
            stacklevel=2,
        )


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype that is a str in a model's config after `save_pretrained`."""
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype


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

"""The transformers side of the base: `from_pretrained` decomposes, saves and loads it like any quantized model.

On an ordinary checkpoint every linear layer but the output embedding and routers becomes a `QosoraLinear`, the
projections of each expert of a mixture among them, and each weight is decomposed as it is read, on the device where it
will live: the full model is never held. `save_pretrained` writes the packed tensors and the config; loading that needs
no configuration and gives the same bytes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from qosora import register
from qosora.base.calibrate import calibration_rows, second_moments
from qosora.base.layout import PlainModel
from qosora.base.structure import decompose_structure
from qosora.checkpoints import open_source, tensor_hashes
from qosora.compat.torch import own_buffers, own_parameters
from qosora.compat.transformers import (
    ConversionOps,
    Deferred,
    WeightConverter,
    WeightTransform,
    forget_conversions,
    forget_tie,
    get_model_conversion_mapping,
    get_module_from_name,
    ignore_in_checkpoint,
    leave_unfilled,
    moved_into,
    no_longer_in_float32,
    read_in_float32,
    tied_weights,
    was_loaded,
)
from qosora.config import QosoraConfig
from qosora.decompose.factorize import factorize
from qosora.dtypes import dtype_named
from qosora.errors import CheckpointError, ConfigError
from qosora.layers import (
    EightBitMatrix,
    LinearExperts,
    QosoraLinear,
    VocabularyMatrix,
    layer_of_stack,
    plain_vocabulary,
    put_together,
    qosora_modules,
    quantized_modules,
    stack_experts,
    taken_apart,
    without_stacking,
)

__all__ = ["QosoraHfQuantizer"]


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


class _Factorize(ConversionOps):
    """Decomposes one weight of an ordinary checkpoint into the parameters of its `QosoraLinear`."""

    def __init__(self, config: QosoraConfig, moments: Mapping[str, torch.Tensor]) -> None:
        self.config, self.moments = config, moments

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_: Any) -> dict[str, torch.Tensor]:
        """Return the parameters of the layers that the weights in `input_dict` belong to, by name."""
        return Deferred(lambda: self._states(input_dict, model))

    def _states(self, weights: dict[str, Any], model: nn.Module | None) -> dict[str, torch.Tensor]:
        if model is None:
            raise CheckpointError("decomposing needs the model that the weights are for")
        result = {}
        for name, value in weights.items():
            module, _ = get_module_from_name(model, name)
            state = self._state(name, module, value[0] if isinstance(value, list) else value)
            result.update({f"{name.removesuffix('weight')}{key}": tensor for key, tensor in state.items()})
        return result

    def _state(self, name: str, module: QosoraLinear | EightBitMatrix, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(module, QosoraLinear) and module.fan_in_fan_out:
            weight = weight.T
        expected = (module.out_features, module.in_features)
        if tuple(weight.shape) != expected:
            raise CheckpointError(
                f"{name}: config.json makes it {expected}, the checkpoint has {tuple(weight.shape)}; "
                "config and weights belong to different models"
            )
        if isinstance(module, EightBitMatrix):
            return module.state_of(weight, name)
        options: dict[str, Any] = {"name": name, "moments": self.moments.get(name.removesuffix(".weight"))}
        options |= self.config.factorize_options() | module.factorize_options
        return module.state_of(factorize(weight, module.rank, **options))


class _TakeApart(ConversionOps):
    """Gives each expert's matrix of one tensor to a layer of its own.

    Args:
        flat: Whether the matrices are one below the other.
    """

    def __init__(self, flat: bool) -> None:
        self.flat = flat

    def convert(
        self, input_dict: dict[str, Any], target_patterns: list[str] | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Return the matrices by the names of the layers' weights."""
        (value,) = input_dict.values()
        stack, names = value[0] if isinstance(value, list) else value, target_patterns or []
        if self.flat and len(stack) % len(names) == 0:
            stack = stack.unflatten(0, (len(names), -1))
        if len(stack) != len(names):
            raise CheckpointError(f"{names[:1]}: config.json makes it one of {len(names)}, the checkpoint {len(stack)}")
        return dict(zip(names, stack, strict=True))


def _taking_apart(model: PreTrainedModel) -> list[WeightConverter]:
    """Return the loader's conversions that take parameters apart: one for all layers of the model."""
    found = {}
    for name, module in model.named_modules():
        for key, stack in taken_apart(module).items():
            if not stack.parts:
                end = re.split(r"\.\d+\.", f"{name}.{key}")[-1]
                found[end] = [f"{layer_of_stack(end, i)}.weight" for i in range(stack.shape[0])], stack.flat
    return [
        WeightConverter(rf"{re.escape(end)}$", targets, operations=[_TakeApart(flat)])
        for end, (targets, flat) in found.items()
    ]


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
        return not self.pre_quantized and isinstance(module, (QosoraLinear, EightBitMatrix)) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that decomposes a weight."""
        return _Factorize(self.quantization_config, self._moments)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:  # the user's is left as it is
            self.quantization_config = model.config.quantization_config = copy.copy(self.quantization_config)
        if not self.pre_quantized and self.quantization_config.embeddings is not None:
            _untie_what_differs(model)
        names = decompose_structure(
            model, self.quantization_config, stored=self.pre_quantized, stacks=not self.pre_quantized
        )
        self._taking_apart = [] if self.pre_quantized else _taking_apart(model)
        quantized = quantized_modules(model)
        for name, module in model.named_modules():  # these have none to fill, nor what only holds such layers
            if name in quantized or not (own_parameters(module) or own_buffers(module)):
                leave_unfilled(module)
        self._moments: dict[str, torch.Tensor] = {}
        if not self.pre_quantized:
            if self.quantization_config.scale == "calibrated":
                self._moments = _measured(model, self.quantization_config, names)
            # Else the loader would round float32 weights to the model's dtype before they are decomposed.
            kept = ((n, m) for n, m in model.named_modules() if n not in quantized)
            others = {f"{name}.{key}" for name, module in kept for key in own_parameters(module)}
            self._read_in_float32 = _few_patterns({f"{name}.weight" for name in quantized}, others)
            read_in_float32(model, self._read_in_float32)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Leave experts as they are on disk, where their matrices are layers of the model."""
        found = without_stacking(super().update_weight_conversions(weight_conversions, model), model)
        of_vocabulary = (n for n, m in model.named_modules() if isinstance(m, VocabularyMatrix))
        moved = [moved_into(model, *name.rsplit(".", 1)) for name in of_vocabulary]
        return [*found, *self._taking_apart, *moved]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _refuse_missing(model)
        forget_conversions(model, self._taking_apart)
        if not self.pre_quantized:
            no_longer_in_float32(model, self._read_in_float32)
        for module in quantized_modules(model).values():
            module.requires_grad_(False)  # the loader makes every float parameter trainable
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Have `save_pretrained` write hashes of the tensors into its files' headers."""
        conversions = without_stacking(get_model_conversion_mapping(model), model)
        all_stay = not any(isinstance(conversion, WeightConverter) for conversion in conversions)
        return None, tensor_hashes(model.state_dict(), all_stay=all_stay)

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
        # `save_pretrained` leaves a str in the model's config
        dtype, loaded_dtype = (None if d is None else dtype_named(d) for d in (dtype, model.config.dtype))
        for name, module in list(model.named_modules()):
            if isinstance(module, QosoraLinear) and not isinstance(module, VocabularyMatrix):
                model.set_submodule(name, _plain_linear(module, dtype))
        plain_vocabulary(model, dtype)
        stack_experts(model)
        put_together(model)
        if dtype not in (None, loaded_dtype):  # the user's choice: embeddings and norms must follow
            model.to(dtype)
            model.config.dtype = dtype
        return model


def _untie_what_differs(model: PreTrainedModel) -> None:
    """Untie the output layer where the checkpoint has another than the embeddings it is tied to, as the loader does."""
    names = {id(module): name for name, module in model.named_modules()}
    head = f"{names.get(id(model.get_output_embeddings()))}.weight"
    partner = tied_weights(model).get(head)
    if partner is None:
        return
    ignore_in_checkpoint(model, head)
    if not model.config.name_or_path:  # made of tensors that the caller has
        return
    with torch.device("cpu"), open_source(model.config.name_or_path) as checkpoint:
        own_code = not type(model).__module__.startswith("transformers.")
        plain = PlainModel(checkpoint.origin, trust_remote_code=own_code)
        on_disk = {plain.locate(name)[0]: name for name in checkpoint.reader.names()}
        if head in on_disk and partner in on_disk:
            mine, other = (checkpoint.reader.tensor(on_disk[name]) for name in (head, partner))
            if not torch.equal(mine, other):
                forget_tie(model, head)
                model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _measured(model: PreTrainedModel, config: QosoraConfig, names: list[str]) -> dict[str, torch.Tensor]:
    """Return what `second_moments` does, by the checkpoint that a model is being loaded from."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The loader has tensors made on the meta device by default here.
    with torch.device("cpu"), open_source(model.config.name_or_path) as checkpoint:
        rows = calibration_rows(config, checkpoint.origin)
        return second_moments(checkpoint, rows, names, device=device)


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
        if not was_loaded(param)
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


register.loaded(__name__)

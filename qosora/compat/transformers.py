"""transformers: the loader's conversions, marks on models and parameters, GGUF tables, what it says in messages."""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qosora.compat.names import ENTRIES, found, uses

if TYPE_CHECKING:
    import torch
    from torch import nn

_LOADING = "transformers.core_model_loading"
_MODEL = "transformers.PreTrainedModel"

_FOUND = found(
    __name__,
    {
        # From names and values on disk to those in memory and back: adapters and exports must name what a loader does.
        "rename_source_key": (
            f"{_LOADING}.rename_source_key"
            "(source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict)"
        ),
        "revert_weight_conversion": f"{_LOADING}.revert_weight_conversion(model, state_dict)",
        "get_model_conversion_mapping": (
            "transformers.conversion_mapping.get_model_conversion_mapping(model, add_legacy)"
        ),
        "WeightConverter": f"{_LOADING}.WeightConverter: operations",
        "WeightRenaming": f"{_LOADING}.WeightRenaming",
        "WeightTransform": f"{_LOADING}.WeightTransform: source_patterns",
        "ConversionOps": f"{_LOADING}.ConversionOps",
        "dot_natural_key": f"{_LOADING}.dot_natural_key(s)",
        # Which module a parameter is of, and which are left as they are: every quantizer asks these.
        "get_module_from_name": "transformers.quantizers.quantizers_utils.get_module_from_name(module, tensor_name)",
        "should_convert_module": "transformers.quantizers.quantizers_utils.should_convert_module(full_name, patterns)",
        # llama.cpp's names and values to transformers': architectures in GGUF_ARCHS by conversions, others by tables.
        "GGUF_ARCHS": "transformers.integrations.gguf.GGUF_ARCHS",
        "get_gguf_conversion_mapping": "transformers.integrations.gguf.get_gguf_conversion_mapping(gguf_arch, config)",
        "TENSOR_PROCESSORS": "transformers.modeling_gguf_pytorch_utils.TENSOR_PROCESSORS",
        "TensorProcessor": "transformers.modeling_gguf_pytorch_utils.TensorProcessor(config)",
    },
)


def __getattr__(name: str) -> Any:
    return _FOUND(name)


# ---- loading -------------------------------------------------------------------------------------------------------


class Deferred(dict[str, "torch.Tensor"]):
    """A result of `ConversionOps.convert` that is computed when it is read.

    The loader turns an error of `convert` into text for a report, goes on with all other weights, and ends in a
    RuntimeError that does not say what was wrong. It reads the result outside of that, by `items()`: an error there
    reaches the caller, at once.
    """

    def __init__(self, compute: Callable[[], dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self._compute = compute

    def items(self) -> ItemsView[str, torch.Tensor]:  # type: ignore[override]
        """Compute it."""
        return self._compute().items()


ENTRIES.append(f"{_LOADING}.convert_and_load_state_dict_in_model: items")


@uses(f"{_LOADING}.set_param_for_module: _is_hf_initialized")
def was_loaded(parameter: torch.Tensor) -> bool:
    """Say whether the loader has filled a parameter: it logs what was not in the checkpoint, and goes on."""
    return getattr(parameter, "_is_hf_initialized", False)


@uses(f"{_MODEL}._initialize_weights: _is_hf_initialized")
def leave_unfilled(module: Any) -> None:
    """Have the loader not fill what a module has at random, by code that may read the weights of linear layers."""
    module._is_hf_initialized = True


@uses(f"{_MODEL}: _keep_in_fp32_modules_strict")
def read_in_float32(model: Any, patterns: set[str]) -> None:
    """Have the loader not round parameters, by regular expressions for their names, to the model's dtype."""
    model._keep_in_fp32_modules_strict = patterns.union(model._keep_in_fp32_modules_strict or ())


@uses(f"{_MODEL}: _keep_in_fp32_modules_strict")
def no_longer_in_float32(model: Any, patterns: set[str]) -> None:
    """Undo `read_in_float32`."""
    model._keep_in_fp32_modules_strict -= patterns


@uses(
    f"{_MODEL}: _keep_in_fp32_modules",
    "transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert"
    "(model, skip_modules, keep_in_fp32_modules, add_default_skips)",
)
def modules_to_skip(model: Any, named: list[str] | None) -> list[str]:
    """Return patterns of the modules that no quantizer converts: the output embedding, those of its class, and some."""
    from transformers.quantizers.base import HfQuantizer

    skip: list[str] = HfQuantizer.get_modules_to_not_convert(
        model, named, model._keep_in_fp32_modules, add_default_skips=True
    )
    # It adds the last parameter's module, which is another one while the loader has not tied the output layer yet.
    last, whole = (list(model.named_parameters(remove_duplicate=unique))[-1][0] for unique in (True, False))
    left = {last.removesuffix(".weight")} - {whole.removesuffix(".weight")} - set(named or ())
    return [name for name in skip if name not in left]


@uses(f"{_MODEL}._get_dtype_plan(dtype)")
def float32_patterns(model: Any, dtype: torch.dtype) -> Iterable[str]:
    """Return patterns of the parameters that a model holds in float32 when it is loaded in a dtype."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


@uses(f"{_MODEL}: _keys_to_ignore_on_load_missing")
def optional_tensors(model: Any) -> Sequence[str]:
    """Return regular expressions for the tensors that a checkpoint may lack."""
    return model._keys_to_ignore_on_load_missing or ()


@uses(f"{_MODEL}._adjust_missing_and_unexpected_keys(loading_info)")
def unexpected_tensors(model: Any, names: Iterable[str]) -> set[str]:
    """Return those of some tensors without a place in a model that are none of those known to be superfluous."""
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
    model._adjust_missing_and_unexpected_keys(info)
    return info.unexpected_keys


@uses(f"{_MODEL}._from_config(config)")
def built_from(model_class: Any, config: Any, **options: Any) -> Any:
    """Return a model without a checkpoint: what `from_config` does, which only the automatic classes have."""
    return model_class._from_config(config, **options)


@uses(f"{_MODEL}._init_weights(module)")
def initialized(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Return a module's own parameters as a model begins with them, float32. The module gets them, too."""
    import torch

    module = model.get_submodule(name).to_empty(device="cpu", recurse=False).float()
    with torch.no_grad():
        for p in module.parameters(recurse=False):
            p.zero_()
        model._init_weights(module)
    return {key: p.detach() for key, p in module.named_parameters(recurse=False)}


@uses(f"{_MODEL}: all_tied_weights_keys")
def tied_weights(model: Any) -> dict[str, str]:
    """Return the parameters that share the value of another: name -> name of the other."""
    return dict(model.all_tied_weights_keys)


def shared_weights(model: Any) -> set[str]:
    """Return the names of the parameters on either side of a tie."""
    ties = tied_weights(model)
    return {*ties, *ties.values()}


@uses(f"{_MODEL}: all_tied_weights_keys", f"{_MODEL}: _tied_weights_keys")
def forget_tie(model: Any, parameter: str) -> None:
    """Have nobody tie a parameter of a model to another, whatever its config says."""
    from transformers import PreTrainedModel

    ties = {**model.all_tied_weights_keys}
    ties.pop(parameter, None)
    model.all_tied_weights_keys = ties
    for name, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and isinstance(keys, dict):
            own = parameter.removeprefix(f"{name}.") if name else parameter
            module._tied_weights_keys = {key: other for key, other in keys.items() if not re.fullmatch(key, own)}


@uses(f"{_MODEL}.get_expanded_tied_weights_keys(all_submodels)")
def remember_ties(model: Any) -> None:
    """Undo `forget_tie`."""
    for module in model.modules():
        vars(module).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@uses(f"{_MODEL}: _keys_to_ignore_on_load_unexpected")
def ignore_in_checkpoint(model: Any, parameter: str) -> None:
    """Have the loader not tell of a tensor in a checkpoint that has no place in the model."""
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, rf"^{re.escape(parameter)}$"}


@uses("transformers.utils.loading_report.log_state_dict_report: ignore_mismatched_sizes")
def says_other_shapes(error: RuntimeError) -> bool:
    """Say whether the loader's error is that tensors have other shapes than the config makes them."""
    return "ignore_mismatched_sizes" in str(error)


# ---- mixtures of experts -------------------------------------------------------------------------------------------

_EXPERTS = "transformers.integrations.moe.use_experts_implementation"


@uses(
    *(
        f"{_EXPERTS}: {name}"
        for name in ("_apply_gate", "has_gate", "is_concatenated", "is_transposed", "has_bias", "has_post_expert_norm")
    )
)
def are_plain_experts(module: Any) -> bool:
    """Say whether a module follows the protocol of exchangeable experts, without any of its options."""
    if not hasattr(module, "_apply_gate") or not module.is_concatenated:
        return False
    return not (module.is_transposed or module.has_bias or module.has_post_expert_norm)


def has_gate(module: Any) -> bool:
    """Say whether experts multiply by a gate's activation, as they do unless they say otherwise."""
    gated: bool = getattr(module, "has_gate", True)
    return gated


@uses("transformers.integrations.moe._default_apply_gate(self, gate_up_out)", f"{_EXPERTS}: _apply_gate")
def own_gate(experts: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what experts make of gate and up projections, concatenated; None where that is act_fn(gate) * up."""
    from transformers.integrations.moe import _default_apply_gate

    own: Callable[[torch.Tensor], torch.Tensor] = experts._apply_gate
    return None if type(experts)._apply_gate is _default_apply_gate else own


@uses(f"{_LOADING}.WeightConverter: operations", f"{_LOADING}.MergeModulelist")
def stacks_experts(conversion: Any) -> bool:
    """Say whether a conversion stacks one matrix for each expert."""
    from transformers.core_model_loading import MergeModulelist, WeightConverter

    return isinstance(conversion, WeightConverter) and isinstance(conversion.operations[0], MergeModulelist)


@uses(f"{_LOADING}.MergeModulelist(dim)", f"{_LOADING}.Concatenate(dim)")
def only_stacks(conversion: Any) -> bool:
    """Say whether a conversion stacks one projection of every expert, or several, one below the other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(operation), operation.dim) for operation in conversion.operations]
    return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


@uses(f"{_LOADING}.WeightTransform.reverse_transform", f"{_LOADING}.WeightTransform.rename_source_key(source_key)")
def makes(conversion: Any, parameter: str) -> bool:
    """Say whether a parameter of the model is what a conversion makes."""
    return conversion.reverse_transform().rename_source_key(parameter)[1] is not None


@uses(
    f"{_LOADING}.WeightTransform.reverse_transform",
    f"{_LOADING}.WeightTransform.rename_source_key(source_key)",
    f"{_LOADING}.WeightTransform.add_tensor(target_key, source_key, source_pattern, future)",
    f"{_LOADING}.WeightConverter.convert(layer_name, model, config)",
)
def names_on_disk(conversion: Any, parameter: str, weight: torch.Tensor, model: Any) -> list[str]:
    """Return the names of the tensors that a conversion makes a parameter of."""
    back = conversion.reverse_transform()
    key, pattern = back.rename_source_key(parameter)
    back.add_tensor(key, parameter, pattern, weight)
    return list(back.convert(key, model=model, config=model.config))


@uses(f"{_LOADING}.convert_and_load_state_dict_in_model: _weight_conversions")
def add_conversions(model: Any, more: Iterable[Any]) -> None:
    """Have `save_pretrained` revert conversions beside those that a model was loaded by; none was, nothing to do."""
    if (loaded_by := getattr(model, "_weight_conversions", None)) is not None:
        model._weight_conversions = [*loaded_by, *more]


@uses(f"{_LOADING}.convert_and_load_state_dict_in_model: _weight_conversions")
def forget_conversions(model: Any, done: Iterable[Any]) -> None:
    """Have `save_pretrained` not revert some conversions that a model was loaded by."""
    done = list(done)
    if (loaded_by := getattr(model, "_weight_conversions", None)) is not None:
        model._weight_conversions = [conversion for conversion in loaded_by if conversion not in done]


@uses(
    f"{_LOADING}.PrefixChange(prefix_to_add)",
    f"{_LOADING}.WeightTransform: scope_prefix",
    f"{_LOADING}.WeightTransform: base_model_prefix",
)
def moved_into(model: Any, module: str, child: str) -> Any:
    """Return the loader's conversion for a module whose tensors, on disk its own, are in memory those of a child."""
    from transformers.core_model_loading import PrefixChange

    conversion = PrefixChange(prefix_to_add=child)
    base, prefix = model.base_model_prefix, f"{model.base_model_prefix}."
    conversion.base_model_prefix = base if base and module.startswith(prefix) else ""
    conversion.scope_prefix = module.removeprefix(prefix) if conversion.base_model_prefix else module
    return conversion


# ---- other conversions ---------------------------------------------------------------------------------------------


@uses(f"{_LOADING}.WeightTransform: source_patterns", f"{_LOADING}.WeightTransform: target_patterns")
def target_patterns(converters: Iterable[Any], pattern: str) -> list[str]:
    """Return all that the converter makes whose source pattern `rename_source_key` has named."""
    targets: list[str] = next(c.target_patterns for c in converters if pattern in c.source_patterns)
    return targets


@uses(
    f"{_LOADING}.WeightTransform: source_patterns",
    f"{_LOADING}.WeightTransform: target_patterns",
    f"{_LOADING}.ConversionOps.convert(input_dict)",
)
def converted(converters: Iterable[Any], pattern: str, values: torch.Tensor, target: str) -> torch.Tensor:
    """Return what the converter of a source pattern makes of one tensor."""
    converter = next(c for c in converters if pattern in c.source_patterns)
    tensors = {pattern: values}
    for operation in converter.operations:
        tensors = operation.convert(
            tensors,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=target,
        )
    (tensor,) = tensors.values()
    return tensor


# ---- keys and values ------------------------------------------------------------------------------------------------


@uses("transformers.generation.utils.GenerationMixin._supports_logits_to_keep")
def keeps_logits(model: Any) -> bool:
    """Say whether a model makes the logits of the last tokens alone when asked to."""
    keeps: bool = model._supports_logits_to_keep()
    return keeps


@uses(
    "transformers.cache_utils.Cache: layers",
    "transformers.cache_utils.DynamicLayer: keys",
    "transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window)",
    "transformers.cache_utils.DynamicSlidingWindowLayer: cumulative_length",
)
def lengthen_cache(cache: Any, tokens: int) -> None:
    """Give the layers of a cache room as if it held more tokens, of no values; states of a fixed size stay."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None or getattr(layer, "values", None) is None:
            continue
        length = layer.keys.shape[-2] + tokens
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length += tokens
        if (window := getattr(layer, "sliding_window", None)) is not None:
            length = min(length, window - 1)
        for name in ("keys", "values"):
            shape = list(getattr(layer, name).shape)
            shape[-2] = length
            setattr(layer, name, getattr(layer, name).new_empty(shape))


# ---- GGUF ----------------------------------------------------------------------------------------------------------

_GGUF = "transformers.modeling_gguf_pytorch_utils"


@uses(f"{_GGUF}.get_gguf_hf_weights_map(hf_model, processor)")
def gguf_names(model: Any, processor: Any) -> dict[str, str]:
    """Return the names in a model by those in a GGUF file.

    transformers' function looks into every submodule, for files that were made of a base model, and builds a table of
    all layers for each: minutes for 80 layers. The model and its base model are what matters: of stand-ins for these
    it reads `config`, `state_dict` and `named_children`.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    def view(module: nn.Module, children: list[tuple[str, SimpleNamespace]]) -> SimpleNamespace:
        return SimpleNamespace(config=model.config, state_dict=module.state_dict, named_children=lambda: children)

    base = view(model.base_model, [])
    names: dict[str, str] = get_gguf_hf_weights_map(view(model, [(model.base_model_prefix, base)]), processor)
    return names


@uses(f"{_GGUF}.TensorProcessor.process(weights, name)", f"{_GGUF}.GGUFTensor(weights)")
def gguf_values(processor: Any, name: str, values: Any, names: dict[str, str]) -> Any:
    """Return the model's values, an array, of a GGUF file's."""
    unused: dict[str, Any] = {"tensors": {}}  # where some processors leave a second copy
    return processor.process(weights=values, name=name, tensor_key_mapping=names, parsed_parameters=unused).weights


# ---- training ------------------------------------------------------------------------------------------------------


@uses("transformers.PreTrainedConfig: _attn_implementation")
def attention_of(config: Any) -> str:
    """Return the attention that a model was built with: "sdpa", "eager"."""
    name: str = config._attn_implementation
    return name


@uses("transformers.TrainingArguments: _n_gpu")
def use_one_gpu(arguments: Any) -> None:
    """Keep Trainer from wrapping the model in `nn.DataParallel` where there are several GPUs."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


#: The logger of the remark below.
TRAINER_LOGGER = "transformers.trainer_utils"


@uses(f"{TRAINER_LOGGER}.logger", f"{TRAINER_LOGGER}.sort_checkpoints: mtime may not be reliable")
def is_of_mtime(message: str) -> bool:
    """Say whether Trainer remarks that it orders checkpoints by their numbers, and not by their time."""
    return "mtime may not be reliable" in message


@uses(f"{_MODEL}: is_gradient_checkpointing", f"{_MODEL}.gradient_checkpointing_enable: is deprecated")
def old_names_warning() -> str:
    """Return a pattern of what it says when PEFT and TRL call checkpointing's methods by their old names."""
    return ".*gradient_checkpointing.* is deprecated"

"""A model on the meta device whose training steps can be traced: few of its layers, extrapolated to all.

Decoder layers repeat with a period p (1 for most models; Gemma 3 has five layers with sliding attention, then one
without). With p more layers, what is live at the same place of a step grows by the same bytes each time: their weights,
what they save, their gradients. So steps of d and d + p layers are traced and each place is extrapolated by itself, in
every category, and only then the largest is taken; a place that grows faster than another may come first only in the
whole model. In a layer, "the same place" is the same distance from the last layer, as for that the most is saved; the
first layer is a place of its own, as it has no input to give a gradient to.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from qosora.base import decompose_structure, head_modules, skipped_modules
from qosora.checkpoints import TAGS, empty_model, require_language_model, task_of
from qosora.compat.peft import load_bnb_layers, mark_as_4bit
from qosora.compat.transformers import attention_of, should_convert_module
from qosora.config import OsoraConfig, QosoraConfig
from qosora.dtypes import dtype_named
from qosora.errors import CheckpointError, QosoraError
from qosora.layers import QosoraLinear, decoder_layers, peaks_alone, qosora_modules, stacked_names
from qosora.memory.meta_kernels import CPU_WORKSPACES, CUDA_WORKSPACES, MetaKernels, computing_as
from qosora.memory.options import GRANULARITY, Batch, Prediction, StepOptions, has_experts
from qosora.memory.standins import (
    STASH,
    FourBitLinear,
    GroupsStandIn,
    OffloadingStandIn,
    PackedStandIn,
    PerTensorStandIn,
    state_shapes,
)
from qosora.memory.step import prepare_model, register_model, training_step, write_answers
from qosora.memory.tracer import Event, Peak, Site, Tracer
from qosora.training import ALIGNMENT, PAGED_NUMEL, parameter_groups, with_head

__all__ = [
    "TracedModel", "meta_model", "prediction", "quantize_linears", "stacked_experts"
]  # fmt: skip

#: Decoder layers whose frozen tensors a GPU holds at once where they come from elsewhere: the one that computes, the
#: next, which comes meanwhile, and the buffer that it comes in; from other GPUs the last one's buffer, too.
_IN_USE = {"host": 3, "fsdp": 4}


class TracedModel:
    """A model with qosora's layers, or QLoRA's, on the meta device.

    Args:
        config: Of the model.
        storage: How it is decomposed; ignored for QLoRA but for `modules_to_not_convert`.
        options: Of the step.
        full_depth: Whether to trace all layers instead of extrapolating.

    Raises:
        CheckpointError: transformers has no such causal language model.
        ConfigError: `storage` does not fit the model.
        QosoraError: The model cannot be traced.
    """

    def __init__(
        self, config: PreTrainedConfig, storage: QosoraConfig, options: StepOptions, *, full_depth: bool = False
    ) -> None:
        self.options = options
        model = meta_model(config, options)
        self.stack, layers = decoder_layers(model)
        if named := storage.modules_to_not_convert:  # among which may be single layers
            quantize_linears(model, storage, options)
        self.attribute = next(name for name, child in self.stack.named_children() if child is layers)
        self.count = len(layers)
        # with offloading, the first layers still fill the stash of tensors on their way
        least = self.count if full_depth else STASH + 2 if options.activation_offloading else 2
        self.depths = _depths(_signatures(layers, config), least)
        self.layers = layers[: self.depths[-1]]
        setattr(self.stack, self.attribute, self.layers)
        if not named:  # of the layers that are traced alone: experts can be many thousand linear layers
            quantize_linears(model, storage, options)
        if stacks := stacked_experts(model):
            raise QosoraError(
                f"{type(model).__name__} cannot be planned: its experts are stacked ({stacks[0]}) and stay in 16 bits, "
                "and what their kernels allocate depends on the GPU and the data. Measure it with `qosora profile`"
            )
        self.vocab: int = model.config.get_text_config().vocab_size
        self.attention = attention_of(model.config)
        model.requires_grad_(False)
        self.task = task_of(model.config)
        if options.method == "qosora":
            adapter: Any = with_head(OsoraConfig(vectors=options.vectors, update_rank=options.update_rank), model)
        else:
            adapter = _lora(options, model)
        with torch.device("meta"):
            self.model = get_peft_model(model, adapter)
        if options.method == "qlora":  # as TRL does for models that are loaded in 4 bits
            for p in self._trained():
                p.data = p.data.to(torch.bfloat16)
        prepare_model(
            self.model,
            gradient_checkpointing=options.gradient_checkpointing,
            fused_head=options.loss == "chunked",
            tiling=options.tiling,
        )
        self.trained_parameters = self._in_all(lambda: sum(p.numel() for p in self._trained()))
        self.buffer_elements = [self._in_all(partial(self._packed, number)) for number in range(len(self._groups()))]
        self.paged_bytes = self._in_all(self._paged_bytes)

    @cached_property
    def layer_bytes(self) -> dict[str, int]:
        """Bytes of all decoder layers' stored matrices, by category."""
        return {name: self._in_all(partial(self._frozen_in_layers, name)) for name in _OF_LAYERS}

    @cached_property
    def largest_layer(self) -> int:
        """Bytes of the largest of them."""
        return max(sum(_frozen(layer).values()) for layer in self.layers)

    @property
    def layer_products(self) -> int:
        """Multiplications of a decoder layer's forward for each token."""
        return max(sum(map(_products, qosora_modules(layer).values())) for layer in self.layers)

    @cached_property
    def ends_bytes(self) -> int:
        """Bytes of all else that is frozen."""
        frozen = self._in_all(lambda: sum(p.nbytes for p in self.model.parameters() if not p.requires_grad))
        return frozen - sum(self.layer_bytes.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of the base that a process keeps in host memory."""
        if self.options.away != "host":
            return 0
        return (sum(self.layer_bytes.values()) + self.ends_bytes) // self.options.gpus

    def _frozen_in_layers(self, category: str) -> int:
        return sum(_frozen(layer)[category] for layer in cast("nn.ModuleList", getattr(self.stack, self.attribute)))

    def _placed(self, sites: dict[Site, Peak]) -> dict[Site, Peak]:
        """Return the peaks with the base where the options have it."""
        away = self.options.away
        if away is None:
            return sites
        part = 0 if away == "host" else 1 / self.options.gpus
        change = {name: round(part * found) - found for name, found in self.layer_bytes.items()}
        change["layers in use"] = _IN_USE[away] * self.largest_layer
        change["embeddings and head"] = round(part * self.ends_bytes)  # beside the whole of them, which a step keeps
        total = sum(change.values())
        return {
            site: replace(peak, total=peak.total + total, live=dict(Counter(peak.live) + Counter(change)))
            for site, peak in sites.items()
        }

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _groups(self) -> list[list[nn.Parameter]]:
        """Return what is trained as the optimizer groups it."""
        groups = parameter_groups(self.model.named_parameters())
        return [[p for _, p in group] for group in groups if group]

    def _packed(self, group: int) -> int:
        return sum(_packed_elements(self._groups()[group]))

    def _cut(self, depth: int) -> nn.ModuleList:
        layers = self.layers[:depth]
        setattr(self.stack, self.attribute, layers)
        return layers

    def _in_all(self, count: Callable[[], int]) -> int:
        """Return a count for the whole model, of what grows with each period of layers alike."""
        found = []
        for depth in self.depths:
            self._cut(depth)
            found.append(count())
        return found[0] if len(found) == 1 else _line(found[0], found[1], self._periods())

    def _periods(self) -> int:
        """Periods of layers that the smaller trace lacks."""
        return (self.count - self.depths[0]) // (self.depths[1] - self.depths[0])

    def _paged_bytes(self) -> int:
        """Bytes of optimizer states in managed memory, which CUDA's allocator never sees."""
        if self.options.device != "cuda":
            return 0
        sizes = [n for p in self._trained() if (n := p.numel()) >= PAGED_NUMEL]
        if self.options.method == "qosora":
            groups = zip(self._groups(), self.buffer_elements, strict=True)
            sizes += [sum(_packed_elements(group)) for group, in_all in groups if in_all >= PAGED_NUMEL]
        shapes = (shape for n in sizes for shape in state_shapes(n, self.options.optimizer))
        return sum(size[0] * dtype.itemsize for size, dtype in shapes)

    def predict(self, batch: Batch, inputs: Mapping[str, torch.Tensor] | None = None) -> Prediction:
        """Return the peak of a step on a batch.

        Args:
            batch: Its shape.
            inputs: The batch itself, where shapes do not say all: with images. What they say decides about the step,
                as the places of images and how many patches each has.
        """
        kernels = _kernels(batch, inputs)
        traces = [(depth, self._trace(batch, depth, kernels, inputs)) for depth in self.depths]
        depth, sites = traces[0]
        if len(traces) == 2:
            deeper, more = traces[1]
            period = deeper - depth
            sites = _extrapolated(_from_end(sites, depth), _from_end(more, deeper), self._periods(), period)
            sites = {site._replace(layer=self._layer(site.layer)): peak for site, peak in sites.items()}
        return prediction(self._placed(sites), self.paged_bytes)

    def events(self, batch: Batch, inputs: Mapping[str, torch.Tensor] | None = None) -> list[Event]:
        """Return the allocations of a step, of the layers that are traced: all, with `full_depth`."""
        log: list[Event] = []
        self._trace(batch, self.depths[-1], _kernels(batch, inputs), inputs, log)
        return log

    def _layer(self, position: int) -> int:
        return {_OUTSIDE: -1, _FIRST: 0}.get(position, self.count + position)

    def _trace(
        self, batch: Batch, depth: int, kernels: MetaKernels, given: Mapping[str, torch.Tensor] | None = None,
        log: list[Event] | None = None,
    ) -> dict[Site, Peak]:  # fmt: skip
        layers = self._cut(depth)
        options, trained = self.options, self._trained()
        for p in trained:
            p.data, p.grad = torch.empty_like(p, memory_format=torch.contiguous_format), None
        workspaces = CUDA_WORKSPACES if options.device == "cuda" else CPU_WORKSPACES
        tracer = Tracer(granularity=GRANULARITY[options.device], workspaces=workspaces, run=kernels, log=log)
        with computing_as(options.device), peaks_alone(), tracer, tracer.following(self.model, self.stack, layers):
            register_model(tracer, self.model)
            optimizer = self._optimizer(tracer, trained)
            with tracer.allocating("batch"):
                if given is None:
                    inputs = batch.tensors(self.vocab, "meta", self.task)
                else:
                    pixels = dtype_named(options.precision)  # those of a card, where it is planned for one elsewhere
                    inputs = {
                        name: tensor.to(pixels if tensor.is_floating_point() else tensor.dtype, copy=True)
                        for name, tensor in given.items()
                    }
            tracer.forget_sites()
            saving: Callable[[], AbstractContextManager[Any]] = nullcontext
            if options.activation_offloading:
                saving = partial(OffloadingStandIn, list(self.model.parameters()))
            try:
                training_step(self.model, inputs, optimizer, tracer, loss=options.loss, saving=saving)
                if batch.written:
                    del inputs
                    write_answers(self.model, batch, self.vocab, tracer)
            except (RuntimeError, NotImplementedError) as error:
                raise QosoraError(
                    f"{type(self.model.get_base_model()).__name__} cannot be traced without weights: "
                    f"{str(error).strip().splitlines()[0]}. `qosora profile` measures it"
                ) from error
        return tracer.sites

    def _optimizer(self, tracer: Tracer, trained: list[nn.Parameter]) -> Any:
        paged = self.options.device == "cuda"
        if self.options.method == "qosora":
            groups = zip(self._groups(), self.buffer_elements, strict=True)
            return GroupsStandIn(
                [PackedStandIn(group, tracer, self.options.optimizer, paged, in_all) for group, in_all in groups]
            )
        return PerTensorStandIn(trained, tracer, self.options.optimizer, paged)


def _kernels(batch: Batch, inputs: Mapping[str, torch.Tensor] | None) -> MetaKernels:
    return MetaKernels(answer=not (batch.padding or batch.packing), valued=inputs is not None)


#: Categories of what is frozen in a decoder layer.
_OF_LAYERS = ("base residual", "factors")


def _frozen(layer: nn.Module) -> dict[str, int]:
    """Return the bytes of a decoder layer's stored matrices, by category."""
    found = dict.fromkeys(_OF_LAYERS, 0)
    for module in qosora_modules(layer).values():
        for name, p in module.named_parameters(recurse=False):
            if name != "bias" and not p.requires_grad:
                found[_OF_LAYERS[not name.startswith("weight")]] += p.nbytes
    return found


def _products(layer: QosoraLinear) -> int:
    """Return the multiplications of a layer's forward for each token."""
    ends = layer.in_features + layer.out_features
    return layer.in_features * layer.out_features + layer.rank * ends


def _packed_elements(group: list[nn.Parameter]) -> list[int]:
    """Return the elements of a group's windows in its buffer."""
    return [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in group if p.numel() < PAGED_NUMEL]


def prediction(sites: dict[Site, Peak], paged_bytes: int) -> Prediction:
    """Return the largest of some places' peaks."""
    site, peak = max(sites.items(), key=lambda item: item[1].total)
    phases: dict[str, int] = {}
    for place, found in sites.items():
        phases[place.phase] = max(found.total, phases.get(place.phase, 0))
    return Prediction(
        peak.total,
        peak.live,
        site,
        peak.op,
        phases,
        paged_bytes,
        {place: found.total for place, found in sites.items()},
    )


def stacked_experts(model: PreTrainedModel) -> list[str]:
    """Return the modules of a mixture that hold all of a layer's experts in one parameter, not as linear layers."""
    return stacked_names(model) if has_experts(model.config) else []


def meta_model(config: PreTrainedConfig, options: StepOptions) -> Any:
    """Return a plain model on the meta device."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    text = config.get_text_config()
    if task_of(config) is None:
        require_language_model(config, config.name_or_path or config.model_type, "the plan of a step")
    elif text.pad_token_id is None:  # as `train` has it: they look for a text's end
        text.pad_token_id = 0
    try:
        with torch.device("meta"):
            return empty_model(
                config, dtype=dtype_named(options.precision), attn_implementation=options.attn_implementation
            )
    except (ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot build a {config.model_type} model: {reason}") from error


def quantize_linears(model: Any, storage: QosoraConfig, options: StepOptions) -> None:
    """Replace linear layers by those of the method, on the meta device."""
    if options.method == "qosora":
        decompose_structure(model, copy.copy(storage), stacks=True)
        return
    skip = skipped_modules(model, storage)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and should_convert_module(name, skip):
            model.set_submodule(name, FourBitLinear(module))
    mark_as_4bit(model)


def _lora(options: StepOptions, model: Any) -> LoraConfig:
    load_bnb_layers()
    kind = {None: "CAUSAL_LM", TAGS: "TOKEN_CLS"}.get(task_of(model.config), "SEQ_CLS")
    in_full = None if kind == "CAUSAL_LM" else head_modules(model)
    return LoraConfig(r=options.lora_rank, target_modules="all-linear", task_type=kind, modules_to_save=in_full)


def _signatures(layers: nn.ModuleList, config: PreTrainedConfig) -> list[Any]:
    """What decides about a layer's memory: its parameters, and what the config lists for each layer."""
    count = len(layers)
    lists = [v for v in vars(config.get_text_config()).values() if isinstance(v, list) and len(v) == count]
    lists = [v for v in lists if v != list(range(count))]  # the numbers of layers, as those with experts of Llama 4
    return [
        (
            [str(values[i]) for values in lists],
            [(name, type(module).__name__) for name, module in layer.named_modules()],
            [(name, p.shape, p.dtype) for name, p in layer.named_parameters()],
        )
        for i, layer in enumerate(layers)
    ]


def _depths(signatures: list[Any], least: int) -> tuple[int, ...]:
    """Return the two numbers of layers to trace, both of at least some, or the one of the whole model."""
    count = len(signatures)
    period = next((p for p in range(1, count) if signatures[p:] == signatures[:-p]), count)
    first = count % period
    while first < max(period + 1, least):
        first += period
    return (count,) if first + period >= count else (first, first + period)


def _from_end(sites: dict[Site, Peak], depth: int) -> dict[Site, Peak]:
    """Return the sites with layers counted from the end, as negative numbers; outside layers and first layer None."""
    return {site._replace(layer=_position(site.layer, depth)): peak for site, peak in sites.items()}


_FIRST, _OUTSIDE = 0, 1


def _position(layer: int, depth: int) -> int:
    return _OUTSIDE if layer < 0 else _FIRST if layer == 0 else layer - depth


def _extrapolated(few: dict[Site, Peak], more: dict[Site, Peak], times: int, period: int) -> dict[Site, Peak]:
    """Return the sites of a model with `times` periods of layers more than the smaller trace."""
    found = {}
    for site, peak in few.items():
        other = more.get(site)
        if other is None or not -period <= site.layer:
            continue
        live = {
            category: value
            for category in peak.live | other.live
            if (value := _line(peak.live.get(category, 0), other.live.get(category, 0), times))
        }
        found[site] = replace(peak, total=_line(peak.total, other.total, times), live=live)
    return found


def _line(first: int, second: int, times: int) -> int:
    return first + times * (second - first)

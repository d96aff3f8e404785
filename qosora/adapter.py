"""The adapter: a PEFT tuner that trains s and o of decomposed layers, and with an `update_rank` a matrix beside them.

An adapter is two float32 vectors per layer, starting as copies of the base's (σ and ones). It replaces the base's pair
while it is active, so one adapter is active at a time; merging writes it into the base's pair, exactly, and the base
stays in 4 bits. With an update the output is y + B A x, of the layer's own input: a base in 4 bits cannot take that up,
so such an adapter is exported, not merged. The adapter records the fingerprint of the base that it was trained on and
refuses any other.

PEFT closes its enum of methods to outsiders; `config.OSORA` stands in, and `register` fills PEFT's tables.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from qosora import register
from qosora.checkpoints import base_fingerprint, require_finite
from qosora.compat.peft import check_adapters_to_merge, check_target_module_exists
from qosora.config import OsoraConfig
from qosora.errors import ConfigError, FingerprintError
from qosora.layers import (
    Member,
    QosoraEmbedding,
    QosoraHead,
    QosoraLinear,
    VocabularyMatrix,
    float32_kept,
    qosora_modules,
    updated,
)
from qosora.patterns import matches_module

__all__ = ["OsoraLayer", "OsoraModel", "model_fingerprint"]


class OsoraLayer(nn.Module, BaseTunerLayer):
    """A decomposed layer with trainable vectors, for any number of adapters.

    Args:
        base_layer: The decomposed layer; it stays frozen.
        adapter_name: Of the first adapter.
        config: What that adapter trains.
    """

    adapter_layer_names = ("osora_s", "osora_o", "osora_A", "osora_B")
    base_layer: QosoraLinear
    osora_s: nn.ParameterDict
    osora_o: nn.ParameterDict
    osora_A: nn.ParameterDict
    osora_B: nn.ParameterDict
    # BaseTunerLayer's, which is untyped
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    set_adapter: Callable[..., None]

    def __init__(self, base_layer: QosoraLinear, adapter_name: str, config: OsoraConfig) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.merged_adapters: list[str] = []
        self._before_merge: tuple[torch.Tensor, torch.Tensor] | None = None
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: OsoraConfig) -> None:
        """Add an adapter that starts where the base is. A vector that is not trained gets no parameter."""
        s, o = self.base_vectors
        if config.vectors in ("both", "s"):
            self.osora_s[adapter_name] = nn.Parameter(s.detach().clone())
        if config.vectors in ("both", "o"):
            self.osora_o[adapter_name] = nn.Parameter(o.detach().clone())
        if rank := min(config.update_rank, self.in_features, self.out_features):
            A, B = s.new_empty(rank, self.in_features), s.new_zeros(self.out_features, rank)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as LoRA's
            self.osora_A[adapter_name], self.osora_B[adapter_name] = nn.Parameter(A), nn.Parameter(B)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Give an adapter the values of another; both have the same parameters."""
        for own in self._own():
            if source in own:
                own[target].copy_(own[source])

    @torch.no_grad()
    def combine(self, sources: list[str], weights: list[float], target: str) -> None:
        """Give an adapter the base's vectors and the weighted sum of how others differ from them."""
        for k, own in enumerate((self.osora_s, self.osora_o)):
            if target in own:
                base = self.base_vectors[k]
                parts = [w * (self.vectors(name)[k] - base) for name, w in zip(sources, weights, strict=True)]
                own[target].copy_(base + torch.stack(parts).sum(0))

    @property
    def base_vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's s (rank,) and o (out_features,), float32, also while an adapter is merged."""
        return self._before_merge or (self.base_layer.s, self.base_layer.o)

    def vectors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return s (rank,) and o (out_features,), float32, of an adapter; the base's where it trains none."""
        s, o = self.base_vectors
        return self.osora_s.get(adapter_name, s), self.osora_o.get(adapter_name, o)

    def update(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return B (out_features, k) and A (k, in_features), float32, of an adapter; None if it has none."""
        if adapter_name not in self.osora_A:
            return None
        return self.osora_B[adapter_name], self.osora_A[adapter_name]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output with the active adapter. x: (..., in_features)."""
        layer, s, o, update = self.member()
        y = layer.apply_vectors(x, s, o)
        return y if update is None else y + updated(x.to(y.dtype), *update)

    def member(self) -> Member:
        """Return what the layer multiplies by, with the active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer.member()
        active = self._active()
        return Member(self.base_layer, *self.vectors(active), self.update(active))

    def _active(self) -> str:
        active = [name for name in self.active_adapters if name in self.osora_s or name in self.osora_o]
        if len(active) > 1:
            raise ConfigError(
                f"adapters {active} are active together, but an OSoRA adapter replaces the base's vectors, so only one "
                "can be: call set_adapter with one name"
            )
        return active[0] if active else ""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write an adapter's vectors into the base layer. Exact, and undone by `unmerge`.

        Args:
            safe_merge: Whether to refuse vectors with NaN or infinity.
            adapter_names: At most one that this layer has; the active one by default.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.osora_s or n in self.osora_o]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise ConfigError(f"only one OSoRA adapter can be merged, got {[*self.merged_adapters, *names]}")
        if self.update(names[0]) is not None:
            raise ConfigError(
                f"adapter {names[0]!r} has an update of rank {len(self.osora_A[names[0]])}, which a base in 4 bits "
                "cannot take up: write merged weights with export_merged (`qosora export`)"
            )
        s, o = (v.detach().clone() for v in self.vectors(names[0]))
        if safe_merge:
            for kind, vector in (("s", s), ("o", o)):
                require_finite(f"{kind} of adapter {names[0]!r}", vector, "its training diverged")
        base = self.base_layer
        self._before_merge = (base.s.data, base.o.data)
        base.s.data, base.o.data = s, o
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Give the base layer the vectors back that it had before `merge`."""
        if self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.s.data, self.base_layer.o.data = self._before_merge
        self._before_merge = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return what an adapter adds to the base's weight, (out_features, in_features), float32."""
        base = self.base_layer
        delta = base.dequantize(*self.vectors(adapter_name)) - base.dequantize(*self.base_vectors)
        update = self.update(adapter_name)
        return delta if update is None else delta.addmm_(*(matrix.detach() for matrix in update))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> OsoraLayer:
        with ExitStack() as stack:
            for own in self._own():
                stack.enter_context(float32_kept(own, list(own)))
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._before_merge is not None:
            s, o = self._before_merge
            self._before_merge = s.to(self.base_layer.s.device), o.to(self.base_layer.o.device)
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter's vectors; PEFT would also cast them to the layer's compute dtype."""
        device = device or self.base_layer.s.device
        for own in self._own():
            if adapter_name in own and own[adapter_name].device.type != "meta":
                own[adapter_name].data = own[adapter_name].data.to(device)

    def _own(self) -> list[nn.ParameterDict]:
        return [self.osora_s, self.osora_o, self.osora_A, self.osora_B]

    def __repr__(self) -> str:
        return "osora." + super().__repr__()


def _within(name: str) -> list[str]:
    """Return a module's name and those of the modules that it is in."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


_HOW_TO_DECOMPOSE = (
    "Load it with from_pretrained(..., quantization_config=QosoraConfig(rank=128)), or convert it once with "
    "`qosora quantize SRC OUT` and load OUT"
)
_HOW_TO_RELOAD = (
    "Give the base that the adapter was trained on, as saved by save_pretrained or `qosora quantize`. If it was never "
    "saved, decompose the model with the same QosoraConfig: from_pretrained(..., quantization_config=QosoraConfig(...))"
)


def divided_by_accelerate() -> str | None:
    """Return what accelerate is configured to divide models with, by which it tells its workers; None for nothing."""
    if told_by_accelerate("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    return f"FSDP{os.environ.get('FSDP_VERSION', '1')}" if told_by_accelerate("ACCELERATE_USE_FSDP") else None


def told_by_accelerate(name: str) -> bool:
    """Say whether accelerate has set an option, which it hands on to its workers in the environment."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _freeze_statistics(model: nn.Module, trained: Collection[str]) -> None:
    """Have batch norms use the statistics that the base has, and change none: no adapter would save them.

    Encoders of speech and some towers of vision have such. Trained on statistics of batches, the model would be another
    than the adapter gives when it is loaded.

    Args:
        model: The base.
        trained: Names of modules that are trained and saved in full.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS) and not {"modules_to_save", *trained} & set(name.split(".")):
            if not vars(module).get("keeps_statistics"):  # with another adapter
                module.register_forward_pre_hook(_as_in_evaluation)
            vars(module)["keeps_statistics"] = True


def _as_in_evaluation(module: nn.Module, args: Any) -> None:
    module.training = False


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


#: What PEFT trains in full, by task.
_HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


class OsoraModel(BaseTuner):
    """The tuner that `get_peft_model(model, OsoraConfig())` makes."""

    prefix = "osora_"
    tuner_layer_cls = OsoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter by its config, of which a copy is filled in, so that the user's serves another model, too.

        One that is added by the very config of another that the model has, `model.peft_config["default"]`, starts as
        that one is: TRL's trainers make the reference of an adapter that is trained on so, and copy themselves only
        parameters that have the names of LoRA's.
        """
        given = self.peft_config[adapter_name]
        twin = next((name for name, c in self.peft_config.items() if c is given and name != adapter_name), None)
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        if config.modules_to_save is None:  # of these tasks, PEFT adds them later, and to the user's
            config.modules_to_save = _HEADS.get(str(config.task_type).rpartition(".")[2])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _freeze_statistics(model, config.modules_to_save or ())
        if twin is not None:
            for module in model.modules():
                if isinstance(module, OsoraLayer):
                    module.copy_adapter(twin, adapter_name)

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the combination s_base + Σ weight (s - s_base) of adapters that are loaded, and of o likewise.

        Args:
            adapters: Their names.
            weights: Of each.
            adapter_name: Of the combination, which is not trained, and saved as any other.
            combination_type: "linear", the only one there is for vectors.

        Raises:
            ConfigError: If there is no such adapter, or one has more than vectors.
        """
        problems = [f"there is no adapter {name!r}" for name in adapters if name not in self.peft_config]
        if not adapters or len(adapters) != len(weights):
            problems.append(f"every adapter takes a weight, got {len(adapters)} adapters and {len(weights)} weights")
        if adapter_name in self.peft_config:
            problems.append(f"there is an adapter {adapter_name!r} already; delete it, or take another name")
        if combination_type != "linear":
            problems.append(f"combination_type must be 'linear' for vectors, got {combination_type!r}")
        configs = [self.peft_config[name] for name in adapters if name in self.peft_config]
        for name, config in zip(adapters, configs, strict=False):
            if config.update_rank or config.modules_to_save or config.trainable_token_indices:
                problems.append(f"adapter {name!r} has more than vectors, and only these can be combined")
        if problems:
            raise ConfigError(problems)
        kinds = {config.vectors for config in configs}
        own = {"base_fingerprint": configs[0].base_fingerprint, "inference_mode": True}
        vectors = kinds.pop() if len(kinds) == 1 else "both"
        made, found = replace(configs[0], vectors=vectors, **own), set()
        for name, layer in self.model.named_modules():
            if isinstance(layer, OsoraLayer) and (layer.osora_s.keys() | layer.osora_o.keys()) & set(adapters):
                found.add(name)
                layer.update_layer(adapter_name, made)
                layer.combine(adapters, weights, adapter_name)
        made.target_modules = found
        self.peft_config[adapter_name] = made

    def _check_new_adapter_config(self, config: OsoraConfig) -> None:
        super()._check_new_adapter_config(config)
        names = self._decomposed()
        if not config.inference_mode and (way := divided_by_accelerate()) is not None:
            raise ConfigError(
                f"accelerate is configured for {way}, which would divide the vectors, and cannot divide tensors of 4 "
                "bits as they are: `qosora train --strategy fsdp` divides the base by FSDP2 without it; plain "
                "data-parallel processes work with any trainer"
            )
        if not names:
            raise ConfigError(
                f"OSoRA adapts a qosora base, and {type(self.model).__name__} has no decomposed layer. "
                + (_HOW_TO_RELOAD if config.base_fingerprint else _HOW_TO_DECOMPOSE)
            )
        saved = config.modules_to_save or ()
        in_full = [n for n in names if any(matches_module(m, part) for m in saved for part in _within(n))]
        if in_full:
            raise ConfigError(
                f"modules_to_save names {in_full[0]!r}, which is frozen in 4 bits and cannot be trained in full. Take "
                "it out, or decompose the model anew with its name in QosoraConfig's modules_to_not_convert"
            )
        fingerprint = model_fingerprint(self.model)
        if config.base_fingerprint is None:
            config.base_fingerprint = fingerprint
        elif fingerprint is not None and config.base_fingerprint != fingerprint:
            raise FingerprintError(
                f"the adapter was trained on the base with fingerprint {config.base_fingerprint}, but this base has "
                f"{fingerprint}: another model, rank or seed, a merged base, or the same model decomposed anew on "
                "other hardware. Load it onto the base it was trained on (its adapter_config.json names "
                f"{config.base_model_name_or_path!r})"
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse LoRA's way to run another adapter per sample, which PEFT would drop in silence."""
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("adapter_names: OSoRA runs one adapter at a time, for all samples; call set_adapter")
        yield

    def _decomposed(self) -> list[str]:
        found = qosora_modules(self.model).items()
        return [n.removesuffix(".base_layer") for n, module in found if not isinstance(module, VocabularyMatrix)]

    def _prepare_adapter_config(self, peft_config: OsoraConfig, model_config: dict[str, Any]) -> OsoraConfig:
        targets = peft_config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            names = self._decomposed()
            ends = replace(peft_config, target_modules={n.rpartition(".")[2] for n in names}, exclude_modules=None)
            selected = {name for name in names if check_target_module_exists(ends, name)}
            # PEFT compares every module with every target: full names, only where ends would mean other modules, too.
            peft_config.target_modules = selected if self._other_targets(ends) else ends.target_modules
            if not selected:
                raise ConfigError(
                    f"layers_to_transform={ends.layers_to_transform!r} with layers_pattern={ends.layers_pattern!r} "
                    f"selects none of the {len(names)} decomposed layers, such as {names[0]!r}"
                )
        self._refuse_other_targets(peft_config)
        return peft_config

    def _other_targets(self, config: OsoraConfig) -> list[str]:
        """Return what is targeted besides decomposed layers."""
        inside, others = "", []
        for name, module in self.model.named_modules():
            if inside and name.startswith(inside):
                continue
            if isinstance(module, (OsoraLayer, QosoraLinear)) and not isinstance(module, VocabularyMatrix):
                inside = f"{name}."
            elif name and check_target_module_exists(config, name):
                others.append(f"{name} ({type(module).__name__})")
        return others

    def _refuse_other_targets(self, config: OsoraConfig) -> None:
        """Raise ConfigError, before the model is changed, if something else than decomposed layers is targeted.

        Quantized embeddings and output layer have no vectors, and cannot be trained in full.
        """
        of_vocabulary = [n for n, m in self.model.named_modules() if isinstance(m, (QosoraEmbedding, QosoraHead))]
        if of_vocabulary and config.trainable_token_indices:
            raise ConfigError(
                f"trainable_token_indices: {of_vocabulary[0]} is quantized, so none of its rows can be trained; "
                "make the base without --embeddings"
            )
        for name in of_vocabulary:
            if any(name == saved or name.endswith(f".{saved}") for saved in config.modules_to_save or ()):
                raise ConfigError(
                    f"modules_to_save={config.modules_to_save!r}: {name} is quantized and cannot be trained in full; "
                    "make the base without --embeddings"
                )
        if others := self._other_targets(config):
            raise ConfigError(
                f"target_modules matches {len(others)} modules that are not decomposed, among them {others[0]}. Leave "
                "them out of target_modules; to train them in full, name them in modules_to_save"
            )

    def _create_and_replace(
        self,
        config: OsoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, OsoraLayer):
            target.update_layer(adapter_name, config)
        elif isinstance(target, QosoraLinear):
            layer = OsoraLayer(target, adapter_name, config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)


def model_fingerprint(model: nn.Module) -> str | None:
    """Return the fingerprint of the base in a model, with or without adapters; None without one or on meta."""
    layers = list(qosora_modules(model).values())
    if not layers or layers[0].s.is_meta:
        return None
    return base_fingerprint(_unmerged_parameters(model))


def _unmerged_parameters(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    originals = {
        id(m.base_layer): m._before_merge
        for m in model.modules()
        if isinstance(m, OsoraLayer) and m._before_merge is not None
    }
    layers = []
    for layer in qosora_modules(model).values():
        tensors: dict[str, torch.Tensor] = dict(layer.named_parameters(recurse=False))
        if id(layer) in originals:
            tensors["s"], tensors["o"] = originals[id(layer)]
        layers.append(tensors)
    return layers


register.loaded(__name__)

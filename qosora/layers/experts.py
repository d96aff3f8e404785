"""Mixtures of experts: one linear layer for each projection of each expert, instead of one stacked parameter for all.

transformers holds the experts of a layer in two parameters, `gate_up_proj` (experts, 2 m, n) and `down_proj`
(experts, n, m), and stacks them while loading, since checkpoints hold a matrix for each: `experts.3.up_proj.weight`. A
matrix is what is decomposed. So the module is replaced by one with linear layers that have the checkpoint's names, and
the loader is told to stack nothing.

What can be replaced is read off the class, not its name: it follows the protocol of transformers' exchangeable experts
implementations, `(hidden_states, top_k_index, top_k_weights)` and `_apply_gate`, without biases or transposes, and its
checkpoints are stacked by nothing but `MergeModulelist` and `Concatenate`. Other experts stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qosora.compat.transformers import (
    WeightConverter,
    WeightTransform,
    add_conversions,
    are_plain_experts,
    get_model_conversion_mapping,
    has_gate,
    makes,
    names_on_disk,
    only_stacks,
    own_gate,
    shared_weights,
    stacks_experts,
)
from qosora.layers.device import device_type
from qosora.layers.grouped import grouped_product, members
from qosora.layers.stacks import hardest, is_taken_apart, taken_apart

__all__ = [
    "LinearExperts",
    "parts_on_disk",
    "projections_of",
    "router_names",
    "split_experts",
    "stack_experts",
    "stacked_names",
    "without_stacking",
]


class LinearExperts(nn.Module):
    """Experts whose projections are linear layers: `experts.3.up_proj`.

    Args:
        stacked: The module that this one stands for, on the meta device.
        projections: Its parameters, each with the names of the projections that are stacked in it, in order.
    """

    def __init__(self, stacked: nn.Module, projections: dict[str, list[str]]) -> None:
        super().__init__()
        self.num_experts = len(stacked.get_parameter("down_proj"))
        self.projections = projections
        # It holds no data, but knows the activation and how gates apply. The tuple keeps it out of the module tree.
        self._stacked: tuple[Any] = (stacked,)
        self._has_gate, self._own_gate = has_gate(stacked), own_gate(stacked)
        for index in range(self.num_experts):
            expert = nn.ModuleDict()
            for parameter, names in projections.items():
                weight = stacked.get_parameter(parameter)
                _, rows, in_features = weight.shape
                for name in names:
                    expert[name] = nn.Linear(
                        in_features, rows // len(names), bias=False, device="meta", dtype=weight.dtype
                    )
            self.add_module(str(index), expert)

    @property
    def stands_for(self) -> nn.Module:
        """The module that this one stands for, without its data."""
        module: nn.Module = self._stacked[0]
        return module

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, (tokens, n).

        Choices are sorted by expert, so that each expert runs once, on its tokens alone, and summed token by token in
        the order of choice: the result does not depend on the order in which threads finish.

        Args:
            hidden_states: (tokens, n).
            top_k_index: Experts of each token, (tokens, k), integers.
            top_k_weights: Their weights, (tokens, k).
        """
        tokens, top_k = top_k_index.shape
        order = top_k_index.flatten().argsort(stable=True)
        if hidden_states.is_meta:  # a planner asks for what is enough
            counts = dict(enumerate(hardest(tokens, top_k, self.num_experts)))
        else:
            counts = dict(enumerate(_tokens_of_each(top_k_index, self.num_experts)))
        outputs = self._outputs(hidden_states[order // top_k], {i: n for i, n in counts.items() if n})
        outputs = (outputs * top_k_weights.flatten()[order, None])[order.argsort()]
        return outputs.view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)

    def _outputs(self, x: torch.Tensor, counts: dict[int, int]) -> torch.Tensor:
        """Return the experts' outputs, (tokens, n).

        Args:
            x: The tokens of the first expert that has any, then those of the next, (tokens, n).
            counts: How many are each expert's.
        """
        experts: dict[int, Any] = {i: self.get_submodule(str(i)) for i in counts}
        if _together(x):
            names = [name for names in self.projections.values() for name in names]
            found = {name: members([expert[name] for expert in experts.values()]) for name in names}
            groups = {name: group for name, group in found.items() if group is not None}
            if len(groups) == len(names):
                return self._mlp(x, lambda name, x: grouped_product(x, list(counts.values()), groups[name]))
        inputs = zip(experts.values(), torch.split(x, list(counts.values())), strict=True)
        return torch.cat([self._mlp(rows, partial(_project, expert)) for expert, rows in inputs])

    def _mlp(self, x: torch.Tensor, project: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        (stacked,) = self._stacked
        inner, (down,) = self.projections.values()
        projected = [project(name, x) for name in inner]
        if not self._has_gate:
            hidden = stacked.act_fn(*projected)
        elif self._own_gate is None:  # without a copy of both into one tensor
            gate, up = projected
            hidden = stacked.act_fn(gate) * up
        else:
            hidden = self._own_gate(torch.cat(projected, -1))
        return project(down, hidden)

    @torch.no_grad()
    def stacked(self) -> nn.Module:
        """Return the module that this one stands for, with the weights of the linear layers."""
        (module,) = self._stacked
        experts: list[Any] = [self.get_submodule(str(index)) for index in range(self.num_experts)]
        for parameter, names in self.projections.items():
            stacks = [torch.stack([expert[name].weight for expert in experts]) for name in names]
            setattr(module, parameter, nn.Parameter(torch.cat(stacks, dim=1)))
        return module


def split_experts(model: PreTrainedModel) -> list[str]:
    """Replace all stacked experts of a model on the meta device by `LinearExperts`, if all of them can be.

    Returns:
        The names of the replaced modules.
    """
    stackers = list(_stackers(get_model_conversion_mapping(model, add_legacy=False)))
    projections = {
        name: _projections(model, name, module, stackers)
        for name, module in model.named_modules()
        for param, tensor in module.named_parameters(recurse=False)
        if tensor.ndim == 3 and any(makes(stacker, f"{name}.{param}") for stacker in stackers)
    }
    if not all(projections.values()):  # the loader's rules hold for all of a model's experts
        return []
    for name, found in projections.items():
        model.set_submodule(name, LinearExperts(model.get_submodule(name), found))
    return list(projections)


def stack_experts(model: PreTrainedModel) -> None:
    """Undo `split_experts`, with the weights that the linear layers now have; they must be `nn.Linear` again."""
    made = any(projections_of(module) for module in model.modules())
    names = [name for name, module in model.named_modules() if isinstance(module, LinearExperts)]
    for name in names:  # one layer at a time: each holds a copy
        model.set_submodule(name, model.get_submodule(name).stacked())
    if made:  # `save_pretrained` reverts what the loader did
        add_conversions(model, _stackers(get_model_conversion_mapping(model, add_legacy=False)))


def without_stacking(conversions: Sequence[WeightTransform], model: nn.Module) -> list[WeightTransform]:
    """Return a loader's conversions without those that would stack what is split in this model."""
    split = [f"{name}.{p}" for name, module in model.named_modules() for p in projections_of(module)]
    dropped = [stacker for stacker in _stackers(conversions) if any(makes(stacker, name) for name in split)]
    return [conversion for conversion in conversions if conversion not in dropped]


def router_names(model: nn.Module) -> set[str]:
    """Return the linear layers beside experts that give a token one value for each expert, or one for all.

    They are routers and gates of shared experts: tiny, and an error of theirs sends tokens to the wrong experts.
    """
    names = set()
    for name, experts in model.named_modules():
        block, _, last = name.rpartition(".")
        if last != "experts":
            continue
        sizes = (1, getattr(experts, "num_experts", len(list(experts.children()))))
        for inner, module in model.get_submodule(block).named_modules():
            linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
            if (inner and len(linears) > 1) or inner.startswith("experts"):
                continue  # a shared expert: it can be as wide as there are experts
            names |= {".".join(filter(None, (block, inner, n))) for n, m in linears.items() if m.out_features in sizes}
    return names


def stacked_names(model: nn.Module) -> list[str]:
    """Return the modules that hold stacked matrices as parameters of their own: experts that could not be split."""
    return [
        name
        for name, module in model.named_modules()
        if not (type(module).__module__.startswith("torch.") or isinstance(module, Conv1D) or is_taken_apart(module))
        and any(p.ndim >= (2 if "experts" in name.split(".") else 3) and len(p) > 1 for p in module.parameters(False))
    ]


def parts_on_disk(model: PreTrainedModel) -> Callable[[str], list[str] | None]:
    """Return what `stacks.take_apart` asks of a loader."""
    makers = [c for c in get_model_conversion_mapping(model, add_legacy=False) if isinstance(c, WeightConverter)]
    stackers = list(_stackers(makers))
    shared = shared_weights(model)

    def parts(parameter: str) -> list[str] | None:
        if parameter in shared:  # what a layer is stored in could not be shared
            return None
        if not any(makes(maker, parameter) for maker in makers):
            return []
        module, _, key = parameter.rpartition(".")
        return _names_on_disk(model, module, key, stackers) or None

    return parts


def projections_of(module: nn.Module) -> dict[str, tuple[int, Sequence[str]]]:
    """Return how many experts a module has as layers, and each one's projections, by the parameter they would be in."""
    if isinstance(module, LinearExperts):
        return {parameter: (module.num_experts, names) for parameter, names in module.projections.items()}
    return {key: (stack.shape[0], stack.parts) for key, stack in taken_apart(module).items() if stack.parts}


def _together(x: torch.Tensor) -> bool:
    """Say whether experts are computed together: a CPU is faster with one matrix after the other, in its cache."""
    return device_type(x) != "cpu" and not torch.compiler.is_compiling()


def _project(expert: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = expert[name](x)
    return y


def _tokens_of_each(top_k_index: torch.Tensor, num_experts: int) -> list[int]:
    """Return how many tokens chose each expert."""
    counts: list[int] = torch.bincount(top_k_index.flatten(), minlength=num_experts).tolist()
    return counts


def _stackers(conversions: Iterable[WeightTransform]) -> Iterator[WeightConverter]:
    """Return the conversions that stack one matrix for each expert."""
    return filter(stacks_experts, conversions)


def _projections(
    model: PreTrainedModel, name: str, module: nn.Module, stackers: list[WeightConverter]
) -> dict[str, list[str]]:
    """Return what `LinearExperts` needs for a module, or nothing if it cannot stand for it."""
    parameters = ["gate_up_proj" if has_gate(module) else "up_proj", "down_proj"]
    if not are_plain_experts(module):
        return {}
    if sorted(dict(module.named_parameters())) != sorted(parameters) or list(module.buffers()):
        return {}
    found = {parameter: _names_on_disk(model, name, parameter, stackers) for parameter in parameters}
    return found if len(found["down_proj"]) == 1 and all(found.values()) else {}


def _names_on_disk(model: PreTrainedModel, module: str, parameter: str, stackers: list[WeightConverter]) -> list[str]:
    """Return the projections of an expert that are stacked in a parameter, by their names on disk; none if unclear."""
    name, weight = f"{module}.{parameter}", model.get_parameter(f"{module}.{parameter}")
    for stacker in stackers:
        if not only_stacks(stacker) or not makes(stacker, name):
            continue
        on_disk = names_on_disk(stacker, name, weight, model)
        projections = list(dict.fromkeys(n.removesuffix(".weight").rpartition(".")[2] for n in on_disk))
        if on_disk == [f"{module}.{i}.{p}.weight" for p in projections for i in range(len(weight))]:
            return projections
    return []

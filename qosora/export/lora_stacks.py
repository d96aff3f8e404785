"""Experts as a LoRA of the parameters that hold all of a layer's: what PEFT calls `target_parameters`.

PEFT has a form for the experts of some families that goes by the names of their projections, and it is lost where a
dense layer has such a name. This one goes by parameters, and holds any that has matrices (experts, ., .): of all
experts A stands below each other, (experts · r, .), and B beside each other, column by column, (., r · experts).
Matrices that transformers puts below each other in one parameter, as gate and up, share a rank of the sum of both, B
with a block for each. A dense layer whose name is an expert's is a parameter (., .).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

from qosora.checkpoints import StoredSpec, Unit, empty_model, load_config
from qosora.compat.peft import convert_peft_config_for_transformers
from qosora.errors import CheckpointError
from qosora.export.stored import AdaptedBase, Layer
from qosora.layers import layer_of_stack, projections_of

__all__ = ["Parameter", "parameters", "stacked_unit", "taken_for_experts", "wrapped"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the plain model, and what is decomposed of it.

    Attributes:
        name: In the plain model.
        experts: The layers of each expert, put below each other in the parameter; None for one that is not decomposed.
        flipped: Whether PEFT takes the parameter's matrices the other way round than the layers compute.
        rank: Of the LoRA of each of an expert's layers.
    """

    name: str
    experts: tuple[tuple[Layer | None, ...], ...]
    flipped: bool
    rank: int

    @property
    def first(self) -> Layer:
        """One of the layers; those in its place in other experts are of its size."""
        return next(layer for expert in self.experts for layer in expert if layer is not None)

    @property
    def total_rank(self) -> int:
        """Of the LoRA of an expert."""
        return self.rank * len(self.experts[0])


def taken_for_experts(adapted: AdaptedBase, modules: Sequence[str]) -> set[str]:
    """Return those of some dense layers that PEFT would take for experts of the model's family, by their names."""
    found = set()
    for kind in {module.rpartition(".")[2] for module in modules}:
        probe = LoraConfig(target_modules=[kind])
        try:
            convert_peft_config_for_transformers(probe, adapted.plain.model, None)
            taken = bool(probe.target_parameters)
        except ValueError:  # it wants what it would put below it, too
            taken = True
        found |= {module for module in modules if taken and module.rpartition(".")[2] == kind}
    return found


def parameters(adapted: AdaptedBase, dense: Sequence[str], ranks: Mapping[str, int]) -> list[Parameter]:
    """Return the parameters with experts that adapters change, and some dense layers.

    Args:
        adapted: The base.
        dense: Layers whose weight is such a parameter.
        ranks: Of what is exported of each layer that adapters change.
    """
    found = [Parameter(f"{module}.weight", ((adapted.layers[module],),), False, ranks[module]) for module in dense]
    model: Any = adapted.plain.model
    for name, module in model.named_modules():
        flipped = bool(getattr(getattr(module, "stands_for", module), "is_transposed", False))
        for parameter, (count, projections) in projections_of(module).items():
            names = [[f"{name}.{i}.{p}" for p in projections] for i in range(count)]
            found += _stack(adapted, f"{name}.{parameter}", names, flipped, ranks)
    for parameter, stack in adapted.plain.stacks.items():
        names = [[layer_of_stack(parameter, i)] for i in range(stack.shape[0])]
        by_columns = adapted.layers[names[0][0]].transposed if names[0][0] in adapted.layers else False
        holder = model.get_submodule(parameter.rpartition(".")[0])
        flipped = by_columns != bool(getattr(holder, "is_transposed", False))
        made = _stack(adapted, parameter, names, flipped, ranks)
        if made and stack.flat:
            raise CheckpointError(
                f"{adapted.base}: PEFT applies the LoRA of a parameter while the module that has it runs, and the "
                f"model reads {parameter} before, so none can hold this adapter; export merged weights"
            )
        found += made
    return found


def _stack(
    adapted: AdaptedBase, parameter: str, names: list[list[str]], flipped: bool, ranks: Mapping[str, int]
) -> list[Parameter]:
    changed = [ranks[name] for expert in names for name in expert if name in ranks]
    experts = tuple(tuple(adapted.layers.get(name) for name in expert) for expert in names)
    return [Parameter(parameter, experts, flipped, max(changed))] if changed else []


def wrapped(adapted: AdaptedBase, config: LoraConfig) -> dict[str, str]:
    """Return where PEFT has the LoRA of each parameter that a config targets: it puts one wrapper into another."""
    with torch.device("meta"):
        plain = load_config(adapted.base)
        vars(plain).pop("quantization_config", None)
        model = get_peft_model(empty_model(plain), LoraConfig(**_only_parameters(config)))
    return {
        f"{name.replace('.base_layer', '').removeprefix('base_model.model.')}.{module.parameter_name}": name
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def _only_parameters(config: LoraConfig) -> dict[str, Any]:
    return {"r": 1, "target_modules": [], "target_parameters": list(config.target_parameters or [])}


def stacked_unit(adapted: AdaptedBase, parameter: Parameter, place: str, make_pair: Any, dtype: torch.dtype) -> Unit:
    """Return the two matrices of a parameter's LoRA.

    Args:
        adapted: The base.
        parameter: Of the plain model.
        place: Name that PEFT has its LoRA by.
        make_pair: Returns B and A of a layer of some directions, of its own rank, and a report.
        dtype: Of the matrices.
    """
    experts, layers = len(parameter.experts), len(parameter.experts[0])
    rows = [next(e[k] for e in parameter.experts if e[k] is not None) for k in range(layers)]
    out_features = sum(layer.out_features for layer in rows if layer is not None)
    in_features, rank = parameter.first.in_features, parameter.total_rank
    if parameter.flipped:
        out_features, in_features = in_features, out_features
    keys = [f"{place}.lora_{side}.weight" for side in "AB"]
    shapes = [(experts * rank, in_features), (out_features, rank * experts)]
    specs = {key: StoredSpec(dtype, shape) for key, shape in zip(keys, shapes, strict=True)}
    known = [layer for expert in parameter.experts for layer in expert if layer is not None]

    def read() -> Any:
        return {layer.module: adapted.directions(layer) for layer in known}

    def make(directions: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        all_A, all_B, report = [], [], {"lost": 0.0, "whole": 0.0}
        for expert in parameter.experts:
            blocks, sides = [], []
            for layer, like in zip(expert, rows, strict=True):
                assert like is not None
                a, b = torch.zeros(parameter.rank, like.in_features), torch.zeros(like.out_features, parameter.rank)
                if layer is not None and layer.module in adapted.vectors:
                    found_B, found_A, said = make_pair(layer, directions[layer.module])
                    a[: len(found_A)], b[:, : len(found_A)] = found_A, found_B
                    report = {key: value + said.get(key, 0.0) for key, value in report.items()}
                blocks.append(b)
                sides.append(a)
            B: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
            A = torch.cat(sides)
            all_A.append(B.T if parameter.flipped else A)
            all_B.append(A.T if parameter.flipped else B)
        made = torch.cat(all_A), torch.stack(all_B, -1).reshape(shapes[1])
        return dict(zip(keys, made, strict=True)), {key: value for key, value in report.items() if report["whole"]}

    files = tuple(dict.fromkeys(file for layer in known for file in adapted.files(layer)))
    return Unit(parameter.name, specs, sum(spec.nbytes for spec in specs.values()), files, read, make)

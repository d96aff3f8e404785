"""Adapters as a LoRA of the original model, which PEFT and whatever serves its format load.

An OSoRA adapter is one, exactly:

    ΔW = (diag(o) U diag(s) - U diag(σ)) Vᵀ diag(c) = B A        B: (m, r), A = Vᵀ diag(c): (r, n), scaling 1

or, by request, the nearest of rank K: with B = Q_B R_B and Aᵀ = Q_A R_A, the singular triplets of the r × r matrix
R_B R_Aᵀ are those of ΔW, which is never formed. In float64, cast once.

Experts have the names that checkpoints and LoRAs of transformers 4 give them, a LoRA for each; PEFT stacks them where
transformers does. Stacking needs all of them, in one rank, so those that lack a part of either get zeros. Where PEFT
does not know how, they are LoRAs of parameters (`lora_stacks`), which programs other than PEFT may not load.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from qosora import __version__
from qosora.base import natural_order
from qosora.checkpoints import (
    ADAPTER_STEM,
    Progress,
    StoredSpec,
    Unit,
    copy_files,
    refuse_input_as_output,
    task_of,
)
from qosora.compat.peft import check_target_module_exists, convert_peft_config_for_transformers
from qosora.errors import CheckpointError, ConfigError
from qosora.export.adapters import TOKENS, Adapter, AdapterChoice
from qosora.export.lora_stacks import Parameter, parameters, stacked_unit, taken_for_experts, wrapped
from qosora.export.merged import checked_dtype
from qosora.export.original import original_of
from qosora.export.run import Export, Reports
from qosora.export.stored import AdaptedBase, Layer
from qosora.export.verify import Verification, verify_export
from qosora.layers import projections_of, stacked_place
from qosora.places import published_name

__all__ = ["LoraReport", "export_lora", "reduced"]

_PREFIX = "base_model.model."
#: One file, as PEFT reads no shards of adapters.
_ONE_FILE = 1 << 62


@dataclass(frozen=True)
class LoraReport:
    """What an export as LoRA did.

    Attributes:
        output: The folder written.
        base: The base as given.
        adapters: Folders of the adapters, with their weights.
        original: The model that the LoRA is for.
        fingerprint: Of the base.
        dtype: Of the matrices.
        rank: Of the LoRA; where ranks differ, the largest.
        adapted_layers: Layers that it adapts.
        rank_error: Relative Frobenius error of ΔW, over all layers, that a reduced rank makes; 0 without.
        replaced: Tensors trained in full (`modules_to_save`).
        total_bytes: Of all tensors.
        wall_seconds: Time it took.
        verification: What the comparison with the adapted model found, or None where none was asked for.
    """

    output: str
    base: str
    adapters: dict[str, float]
    original: str
    fingerprint: str
    dtype: str
    rank: int
    adapted_layers: int
    rank_error: float
    replaced: list[str]
    total_bytes: int
    wall_seconds: float
    verification: Verification | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def export_lora(
    base: str | Path,
    output: str | Path,
    adapter: AdapterChoice,
    *,
    original: str | Path | None = None,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    verify: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> LoraReport:
    """Write adapters of a base as a standard PEFT LoRA of the model that the base was made of.

    Args:
        base: Folder or hub id of a qosora base.
        output: Folder to make.
        adapter: Folder or hub id of an adapter, or several with weights, as in `export_merged`.
        original: Folder, hub id or GGUF file of the original model, which the LoRA names; by default what the base's
            manifest names. If it is on this machine, it is checked to be the base's original.
        rank: Reduce the LoRA to the best one of this rank.
        dtype: "bfloat16", "float16" or "float32" (or the torch dtype) of the matrices; by default the base's.
        verify: As in `export_merged`; loads the original and the LoRA with PEFT.
        overwrite: Whether a model or adapter in `output` may be replaced.
        restart: Whether to throw away what an unfinished call has left, from where this one would go on.
        trust_remote_code: Whether to run model code that the base brings.
        progress: Called at the start and after each layer.

    Raises:
        CheckpointError: If base, adapter, original or output cannot be used, a value does not fit into `dtype`, or the
            verification fails.
        ConfigError: If an option makes no sense, or the original is not known.
        FingerprintError: If the adapter was trained on another base.

    Example:
        >>> export_lora("llama-2-7b-qosora", "llama-2-7b-lora", "runs/gsm8k/adapter")  # doctest: +SKIP
    """
    target = _checked_options(dtype, rank)
    with Export(base, output, adapter, trust_remote_code=trust_remote_code) as export:
        adapted = export.adapted
        if adapted.vocabulary is not None:
            raise CheckpointError(
                f"{adapted.adapters[0].folder} was trained with {adapted.vocabulary} tokens, more or fewer than the "
                "original has, so no program could load the LoRA onto that as it is; export merged weights"
            )
        if not adapted.vectors:
            raise CheckpointError(f"{', '.join(adapted.folders)}: no vectors there to make a LoRA of")
        named = str(original or original_of(adapted.base) or "")
        if not named:
            raise ConfigError(f"{base}: a LoRA names the model it is for, and the base does not tell; say --original")
        refuse_input_as_output(output, Path(named))
        if verify or Path(named).exists():
            export.open_original(named)
        else:
            adapted.require_pristine()
        lora_dtype = target or adapted.dtype
        config, units = _lora(adapted, published_name(named, output), rank, lora_dtype)
        units += [unit for adapter in adapted.adapters for unit in _in_full(adapter, lora_dtype)]

        def finish(folder: Path) -> None:
            copy_files(folder, adapted.base, adapted.adapters[0].folder, with_code=False)
            config.save_pretrained(str(folder))
            (folder / "README.md").write_text(_model_card(named, config, adapted), encoding="utf-8")

        def check(folder: Path, reports: Reports) -> Verification:
            return verify_export(folder, export.reference, lora_dtype, model=named, rank_error=_rank_error(reports))

        reports, common = export.write(
            units,
            finish,
            check if verify else None,
            original=named,
            dtype=lora_dtype,
            options={"rank": rank},
            max_shard_bytes=_ONE_FILE,
            stem=ADAPTER_STEM,
            overwrite=overwrite,
            restart=restart,
            progress=progress,
        )
        return LoraReport(
            **common,
            rank=config.r,
            adapted_layers=len(adapted.vectors),
            rank_error=_rank_error(reports),
            replaced=natural_order(name for a in adapted.adapters for name in [*a.full, *a.tokens]),
        )


def reduced(B: torch.Tensor, A: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best approximation of B A of a lower rank, its singular values shared by both sides.

    Args:
        B: (out_features, r).
        A: (r, in_features).
        rank: At most r.

    Returns:
        B (out_features, rank), A (rank, in_features), and all singular values of B A (r,), float64.
    """
    left, from_left = torch.linalg.qr(B.double())
    right, from_right = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(from_left @ from_right.T)
    root = S[:rank].sqrt()
    return left @ (U[:, :rank] * root), (right @ (Vh[:rank].T * root)).T, S


def _pair(
    adapted: AdaptedBase, target: int | None, layer: Layer, directions: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return B and A of a layer, reduced to rank `target`, and what that loses."""
    B, A = adapted.low_rank(layer, *directions)
    if target is None or target >= B.shape[1]:
        return B, A, {}
    B, A, S = reduced(B, A, target)
    squares = S.square()
    return B, A, {"lost": float(squares[target:].sum()), "whole": float(squares.sum())}


def _unit(adapted: AdaptedBase, layer: Layer, target: int | None, rank: int, dtype: torch.dtype) -> Unit:
    """Return the two matrices of a layer, reduced to rank `target` and filled up with zeros to `rank`."""
    prefix = f"{_PREFIX}{_name(adapted, layer)}.lora_"
    specs = {
        f"{prefix}A.weight": StoredSpec(dtype, (rank, layer.in_features)),
        f"{prefix}B.weight": StoredSpec(dtype, (layer.out_features, rank)),
    }

    def make(directions: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        B, A, report = _pair(adapted, target, layer, directions)
        missing = rank - B.shape[1]
        made = {
            f"{prefix}A.weight": torch.nn.functional.pad(A, (0, 0, 0, missing)),
            f"{prefix}B.weight": torch.nn.functional.pad(B, (0, missing)),
        }
        return made, report

    cost = sum(spec.nbytes for spec in specs.values())
    return Unit(layer.module, specs, cost, adapted.files(layer), lambda: adapted.directions(layer), make)


def _in_full(adapter: Adapter, dtype: torch.dtype) -> Iterator[Unit]:
    """Return the tensors that were trained in full, which a LoRA brings as they are."""
    brought = {f"{_PREFIX}{name}": what for name, what in adapter.full.items()}
    for module, (_, rows) in adapter.tokens.items():
        brought[f"{_PREFIX}{module}{TOKENS}"] = StoredSpec(rows.dtype, tuple(rows.shape)), partial(torch.clone, rows)
    for key, (spec, read) in brought.items():
        cast = StoredSpec(dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)

        def make(tensor: torch.Tensor, key: str = key) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            return {key: tensor}, {}

        yield Unit(key, {key: cast}, cast.nbytes, adapter.files, read, make)


def _rank_error(reports: Mapping[str, dict[str, Any]]) -> float:
    """Return what reducing the rank loses of all layers' ΔW."""
    lost, whole = (sum(report.get(key, 0.0) for report in reports.values()) for key in ("lost", "whole"))
    return math.sqrt(lost / whole) if whole else 0.0


def _name(adapted: AdaptedBase, layer: Layer) -> str:
    """Return the name by which PEFT finds a layer's matrices: it renames what it reads as transformers' loader does."""
    by_module = f"{layer.module}.lora_A.weight"
    if _is_expert(adapted, layer) or adapted.plain.renamed(by_module) != by_module:
        return layer.disk
    return layer.module


def _is_expert(adapted: AdaptedBase, layer: Layer) -> bool:
    parts = layer.module.split(".")
    parents = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(projections_of(adapted.plain.model.get_submodule(parent)) for parent in parents)


def _lora(adapted: AdaptedBase, original: str, target: int | None, dtype: torch.dtype) -> tuple[LoraConfig, list[Unit]]:
    """Return the config that makes PEFT adapt just what the adapters change, all with scaling 1, and the matrices."""
    possible = {module: adapted.change_rank(layer) for module, layer in adapted.layers.items()}
    possible = {module: min(rank, target or rank) for module, rank in possible.items()}
    changed = {module: possible[module] for module in adapted.layers if module in adapted.vectors}
    experts = [module for module, layer in adapted.layers.items() if _is_expert(adapted, layer)]
    if not set(experts) & changed.keys():
        experts = []
    shared = max((possible[module] for module in experts), default=0)  # all of them, in one rank
    ranks = changed | dict.fromkeys(experts, shared)
    config = _config(adapted, ranks, original, shared)
    others = ranks.keys() - experts
    if _are_stacked_by_name(adapted, config, set(experts), others):
        return config, [_unit(adapted, adapted.layers[m], target, ranks[m], dtype) for m in ranks]
    dense = [m for m in changed if m in others and not _is_of_stack(adapted, m)]
    by_parameter = taken_for_experts(adapted, dense)
    found = parameters(adapted, sorted(by_parameter), changed)
    ranks = {m: changed[m] for m in dense if m not in by_parameter}
    config = _config(adapted, ranks, original, 0)
    config.target_parameters = [parameter.name for parameter in found]
    for parameter in found:
        if parameter.total_rank != config.r:
            config.rank_pattern[parameter.name] = config.alpha_pattern[parameter.name] = parameter.total_rank
    place = wrapped(adapted, config)
    place = {p.name: _PREFIX + _place(adapted, p, place[p.name].removeprefix(_PREFIX)) for p in found}
    pair = partial(_pair, adapted, target)
    units = [_unit(adapted, adapted.layers[m], target, ranks[m], dtype) for m in ranks]
    return config, units + [stacked_unit(adapted, p, place[p.name], pair, dtype) for p in found]


def _place(adapted: AdaptedBase, parameter: Parameter, place: str) -> str:
    """Return the name by which PEFT finds the matrices of a parameter's LoRA, as `_name` does."""
    holder, _, _ = parameter.name.rpartition(".")
    on_disk = parameter.first.disk.removesuffix(parameter.first.module.removeprefix(holder))
    for name in (place, place.replace(holder, on_disk, 1)):
        if adapted.plain.renamed(f"{name}.lora_A.weight") == f"{place}.lora_A.weight":
            return name
    raise CheckpointError(
        f"{adapted.base}: PEFT would look for the LoRA of {parameter.name} under another name, so none can hold this "
        "adapter; export merged weights"
    )


def _config(adapted: AdaptedBase, ranks: Mapping[str, int], original: str, usual: int) -> LoraConfig:
    """Return a config for some layers.

    Args:
        adapted: The base.
        ranks: Of the layers.
        original: What the LoRA is of.
        usual: Rank of what no pattern names; the largest by default.
    """
    rank = usual or max(ranks.values(), default=1)
    kinds: dict[str, list[str]] = {}
    for module in ranks:
        kinds.setdefault(module.rpartition(".")[2], []).append(module)
    pattern: dict[str, int] = {}
    targets: list[str] = []
    for kind, modules in kinds.items():
        found = {ranks[module] for module in modules}
        if found != {rank}:
            pattern |= {kind: found.pop()} if len(found) == 1 else {module: ranks[module] for module in modules}
        targets += [kind] if _matched(adapted, kind) == set(modules) else modules
    return LoraConfig(
        task_type=adapted.adapters[0].config.task_type,
        inference_mode=True,
        base_model_name_or_path=original,
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets,
        trainable_token_indices=next((a.config.trainable_token_indices for a in adapted.adapters if a.tokens), None),
        modules_to_save=[name for adapter in adapted.adapters for name in adapter.config.modules_to_save or ()] or None,
        fan_in_fan_out=any(adapted.layers[module].transposed for module in ranks),
    )


def _is_of_stack(adapted: AdaptedBase, module: str) -> bool:
    place = stacked_place(module)
    return place is not None and place[0] in adapted.plain.stacks


def _matched(adapted: AdaptedBase, kind: str) -> set[str]:
    """Return the modules of the plain model that PEFT would adapt for a target."""
    probe = LoraConfig(target_modules=[kind])
    return {name for name, _ in adapted.plain.model.named_modules() if check_target_module_exists(probe, name)}


def _are_stacked_by_name(adapted: AdaptedBase, config: LoraConfig, experts: set[str], others: set[str]) -> bool:
    """Say whether PEFT stacks the experts' matrices, and no others, where transformers has stacked the experts."""
    if any(_is_of_stack(adapted, module) for module in others):
        return False
    probe = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(probe, adapted.plain.model, None)
    except ValueError:  # it stacks some of what the adapter has with what it has not
        return False
    if not experts:  # PEFT goes by names, of the family's experts, if this model has any or not
        return not probe.target_parameters
    names = {module.rpartition(".")[2] for module in experts}
    all_experts = {
        f"{name}.{i}.{projection}"
        for name, module in adapted.plain.model.named_modules()
        for count, projections in projections_of(module).values()
        for i in range(count)
        for projection in projections
    }
    mixed = any(module.rpartition(".")[2] in names for module in others)
    return bool(probe.target_parameters) and not mixed and all_experts <= experts


def _model_card(original: str, config: LoraConfig, adapted: AdaptedBase) -> str:
    name = Path(original).name if Path(original).exists() else original
    kind, model = adapted.plain.class_name, adapted.plain.model.config
    labels = f", num_labels={model.num_labels}" if task_of(model) is not None else ""
    return (
        f"---\nlibrary_name: peft\nbase_model: {name}\ntags: [lora]\n---\n\n"
        f"LoRA of rank {config.r} for {name}, exported from an OSoRA adapter by qosora {__version__}.\n\n"
        f"```python\nfrom peft import PeftModel\nfrom transformers import {kind}\n\n"
        f'model = PeftModel.from_pretrained({kind}.from_pretrained("{name}"{labels}), "THIS_FOLDER")\n```\n'
    )


def _checked_options(dtype: str | torch.dtype | None, rank: int | None) -> torch.dtype | None:
    problems: list[str] = []
    target = checked_dtype(dtype, problems)
    if rank is not None and (type(rank) is not int or rank < 1):
        problems.append(f"rank must be an integer of at least 1, got {rank!r}")
    if problems:
        raise ConfigError(problems)
    return target

"""A base and adapters as a plain Hugging Face checkpoint.

    onto dequantized    W = (R + diag(o) U diag(s) Vᵀ) diag(c)       the weight that training saw
    onto original       W = W0 + (diag(o) U diag(s) - U diag(σ)) Vᵀ diag(c)

with the adapters' s and o, or the base's own, and c = 1 where the base has no scale; merged in float32 and cast once,
one layer at a time, from the files of the base and of the original into the shards of the result. No model is ever
built.

The first is what was trained and evaluated, up to the rounding of the cast. The second leaves the quantization error
behind, which training may have worked around, at the price of needing the original model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qosora.base import PlainModel, natural_order
from qosora.checkpoints import (
    CONFIG_NAME,
    Progress,
    StoredSpec,
    Unit,
    copy_files,
    require_finite,
    tokenizer_folder,
    write_json,
)
from qosora.decompose import Factors
from qosora.dtypes import COMPUTE_DTYPES, dtype_name, dtype_named
from qosora.errors import CheckpointError, ConfigError
from qosora.export.adapters import AdapterChoice
from qosora.export.original import Original
from qosora.export.run import Export, Reports
from qosora.export.stored import AdaptedBase, Layer, Stored
from qosora.export.verify import Verification, verify_export
from qosora.layers import Stack, stacked_place

__all__ = ["ONTO", "ExportReport", "checked_dtype", "export_merged"]

ONTO = ("dequantized", "original")
#: Values that are not finite.
_WHY = "the base is damaged, or the training diverged"


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        output: The folder written.
        base: The base as given.
        adapters: Folders of the adapters, with their weights.
        onto: "dequantized" or "original".
        original: The original model where it is merged onto that, or None.
        fingerprint: Of the base.
        dtype: Of the merged weights.
        merged_layers: Layers whose weights were made.
        adapted_layers: Those of them that the adapters have vectors for.
        quantization_error: Onto the original: mean relative Frobenius error of the base's layers, which the export does
            not have.
        replaced: Other tensors that the adapter brought (`modules_to_save`).
        untied: Tensors that the base shares with another and the export does not, since only one was trained.
        tokenizer_from: The folder that the tokenizer was copied from, or None where there is none.
        tensor_count: Tensors written.
        total_bytes: Their bytes.
        shard_count: The files they lie in.
        wall_seconds: Time it took.
        verification: What the comparison with the adapted model found, or None where none was asked for.
    """

    output: str
    base: str
    adapters: dict[str, float]
    onto: str
    original: str | None
    fingerprint: str
    dtype: str
    merged_layers: int
    adapted_layers: int
    quantization_error: float | None
    replaced: list[str]
    untied: list[str]
    tokenizer_from: str | None
    tensor_count: int
    total_bytes: int
    shard_count: int
    wall_seconds: float
    verification: Verification | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def export_merged(
    base: str | Path,
    output: str | Path,
    adapter: AdapterChoice | None = None,
    *,
    onto: str = "dequantized",
    original: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 1_000_000_000,
    verify: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Write a base, with adapters merged into it, as a plain checkpoint.

    Carried along are the tokenizer of the adapter's folder, or else of the base's, and the base's generation config,
    model card and licence. Code (`*.py`) is carried only with `trust_remote_code`: without it nothing would run it.

    Args:
        base: Folder or hub id of a qosora base.
        output: Folder to make.
        adapter: Folder or hub id of an adapter, or several with the weights of a linear combination of their vectors,
            s_base + Σ weight (s - s_base), and o likewise; without one the base is exported as it is.
        onto: "dequantized": the weights that training saw. "original": those of the model that the base was made of,
            plus exactly what was learned.
        original: Folder, hub id or GGUF file of that model; by default where the base's manifest says it was.
        dtype: "bfloat16", "float16" or "float32" (or the torch dtype) of the result; by default the base's. Tensors
            that the model class keeps in float32 stay as they are.
        max_shard_bytes: Size of the output's shards.
        verify: Whether to compare the logits of the result, loaded where qosora cannot be imported, with those of the
            adapted model; where they differ, nothing is left of the result. Takes memory for a whole model.
        overwrite: Whether a model in `output` may be replaced; it stays as it is until the new one is complete.
        restart: Whether to throw away what an unfinished call has left, from where this one would go on.
        trust_remote_code: Whether to run model code that the base brings.
        progress: Called at the start and after each tensor.

    Raises:
        CheckpointError: If base, adapter, original or output cannot be used, a weight does not fit into `dtype`, or the
            verification fails.
        ConfigError: If an option makes no sense.
        FingerprintError: If the adapter was trained on another base.

    Example:
        >>> export_merged("llama-2-7b-qosora", "llama-2-7b-tuned", "runs/gsm8k/adapter")  # doctest: +SKIP
    """
    target = _checked_options(dtype, max_shard_bytes, onto, original)
    with Export(base, output, adapter, trust_remote_code=trust_remote_code) as export:
        adapted = export.adapted
        opened = export.open_original(original) if onto == "original" else None
        merged_dtype = target or adapted.dtype
        units = _units(adapted, opened, target)
        adapter_folder = adapted.adapters[0].folder if adapted.adapters else None
        tokenizer = tokenizer_folder(adapter_folder, adapted.base)

        def finish(folder: Path) -> None:
            copy_files(folder, adapted.base, adapter_folder, with_code=trust_remote_code)
            _write_config(folder, adapted, merged_dtype, trust_remote_code)

        def check(folder: Path, _: Reports) -> Verification:
            return verify_export(folder, export.reference, merged_dtype)

        reports, common = export.write(
            units,
            finish,
            check if verify else None,
            original=None if opened is None else opened.name,
            dtype=merged_dtype,
            options={"onto": onto},
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            restart=restart,
            progress=progress,
        )
        errors = [report["quantization_error"] for report in reports.values() if report]
        return ExportReport(
            **common,
            onto=onto,
            merged_layers=len(adapted.layers),
            adapted_layers=len(adapted.vectors),
            quantization_error=sum(errors) / len(errors) if errors else None,
            replaced=natural_order(disk for disk, stored in adapted.tensors.items() if stored.trained),
            untied=adapted.untied,
            tokenizer_from=None if tokenizer is None else str(tokenizer),
            tensor_count=len(units),
            shard_count=len(list(Path(output).glob("*.safetensors"))),
        )


def _units(adapted: AdaptedBase, original: Original | None, target: torch.dtype | None) -> list[Unit]:
    """Return what the export consists of, layer by layer."""
    units = {}
    for disk, stored in adapted.tensors.items():
        dtype = stored.dtype
        if target is not None and dtype.is_floating_point and not adapted.plain.keeps_float32(stored.name, target):
            dtype = target
        units[disk] = _copied(disk, stored, None if stored.trained else original, dtype)
    for layer in adapted.layers.values():
        units[f"{layer.disk}.weight"] = _merged(adapted, original, layer, target or adapted.dtype)
    stacks: dict[str, list[Unit]] = {}
    for disk in natural_order(units) if adapted.plain.stacks else ():
        name = adapted.plain.locate(disk)[0].removesuffix(".weight")
        if (place := stacked_place(name)) is not None and place[0] in adapted.plain.stacks:
            stacks.setdefault(place[0], []).append(units.pop(disk))
    on_disk = adapted.plain.stacks_on_disk
    units |= {on_disk[n]: _stacked(on_disk[n], adapted.plain.stacks[n], found) for n, found in stacks.items()}
    return [units[name] for name in natural_order(units)]


def _copied(disk: str, stored: Stored, original: Original | None, dtype: torch.dtype) -> Unit:
    spec = StoredSpec(dtype, stored.shape)
    read, files = stored.read, stored.files
    if original is not None:
        read, files = partial(original.tensor, stored), (original.file(stored.name),)

    def make(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {disk: require_finite(disk, tensor, _WHY) if stored.trained else tensor}, {}

    return Unit(disk, {disk: spec}, spec.nbytes, files, read, make)


def _merged(adapted: AdaptedBase, original: Original | None, layer: Layer, dtype: torch.dtype) -> Unit:
    name, shape = f"{layer.disk}.weight", (layer.out_features, layer.in_features)
    spec = StoredSpec(dtype, shape[::-1] if layer.transposed else shape)
    cost = 4.0 * math.prod(shape)  # a copied tensor costs its bytes; this one is made in float32
    files = adapted.files(layer)
    if original is not None:
        files = (*files, original.file(f"{layer.module}.weight"))

    def read() -> tuple[Factors, torch.Tensor | None]:
        return adapted.factors(layer), None if original is None else original.weight(layer)

    def make(given: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        factors, weight = given
        report = {}
        if original is None:
            weight = adapted.merged(layer, factors)
        else:
            report["quantization_error"] = original.quantization_error(layer, weight, factors)
            if layer.module in adapted.vectors:
                weight = torch.addmm(weight.float(), *adapted.low_rank(layer, factors.U, factors.V))
        require_finite(name, weight, _WHY)
        return {name: weight.T if layer.transposed else weight}, report

    return Unit(name, {name: spec}, cost, files, read, make)


def _stacked(disk: str, stack: Stack, matrices: list[Unit]) -> Unit:
    """Return the unit that puts experts together again, which a plain checkpoint holds in one tensor."""
    (spec,) = matrices[0].specs.values()
    rows, columns = spec.shape
    whole = StoredSpec(spec.dtype, (len(matrices) * rows, columns) if stack.flat else (len(matrices), rows, columns))

    def read() -> list[Any]:
        return [unit.read() for unit in matrices]

    def make(given: list[Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensor = torch.empty(whole.shape, dtype=whole.dtype)
        errors: list[float] = []
        for i, unit in enumerate(matrices):
            made, report = unit.make(given[i])
            (tensor[stack.place(i)],) = made.values()
            given[i] = None
            errors += [report["quantization_error"]] if report else []
        return {disk: tensor}, {"quantization_error": sum(errors) / len(errors)} if errors else {}

    files = tuple(dict.fromkeys(file for unit in matrices for file in unit.files))
    return Unit(disk, {disk: whole}, sum(unit.cost for unit in matrices), files, read, make)


def checked_dtype(dtype: str | torch.dtype | None, problems: list[str]) -> torch.dtype | None:
    """Return a dtype by its name, or add to the problems."""
    if dtype is None:
        return None
    if (name := dtype_name(dtype)) not in COMPUTE_DTYPES:
        problems.append(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {dtype!r}")
        return None
    return dtype_named(name)


def _checked_options(
    dtype: str | torch.dtype | None, max_shard_bytes: int, onto: str, original: str | Path | None
) -> torch.dtype | None:
    problems: list[str] = []
    target = checked_dtype(dtype, problems)
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        problems.append(f"max_shard_bytes must be an integer of at least 1, got {max_shard_bytes!r}")
    if onto not in ONTO:
        problems.append(f"onto must be one of {', '.join(ONTO)}, got {onto!r}")
    elif onto == "dequantized" and original is not None:
        problems.append(f"original={str(original)!r} is not used onto dequantized weights; say onto='original'")
    if problems:
        raise ConfigError(problems)
    return target


def _write_config(folder: Path, adapted: AdaptedBase, dtype: torch.dtype, with_code: bool) -> None:
    config = dict(adapted.config)
    for key in ("quantization_config", "torch_dtype", *([] if with_code else ["auto_map"])):
        config.pop(key, None)
    config["dtype"] = name = str(dtype).removeprefix("torch.")
    for key, value in config.items():  # the text model of a multimodal one
        if isinstance(value, dict) and "dtype" in value:
            config[key] = {**value, "dtype": name}
    if adapted.vocabulary is not None:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "vocab_size" in part:
                part["vocab_size"] = adapted.vocabulary
    if adapted.untied:
        config["tie_word_embeddings"] = False
        for key, value in config.items():
            if isinstance(value, dict) and "tie_word_embeddings" in value:
                config[key] = {**value, "tie_word_embeddings": False}
    write_json(folder / CONFIG_NAME, config)
    if adapted.untied:
        plain = PlainModel(folder, with_code, stacks=adapted.plain.stacks_format)
        names = {stored.name for stored in adapted.tensors.values()} | {f"{module}.weight" for module in adapted.layers}
        tied = [adapted.tensors[disk].name for disk in adapted.untied if plain.tied_to(adapted.tensors[disk].name)]
        if tied or plain.missing(names):
            raise CheckpointError(
                f"{adapted.adapters[0].folder} trains one of some tied tensors apart from the others "
                f"({', '.join(adapted.untied)}), but a {plain.class_name} cannot have them apart, so a plain "
                "checkpoint cannot hold this adapter"
            )

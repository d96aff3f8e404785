"""A base and an adapter as a plain Hugging Face checkpoint.

    W = R + diag(o) U diag(s) Vᵀ        with the adapter's s and o, or the base's own

merged in float32 and cast once, one layer at a time, from the base's files into the shards of the result; no model is
ever built. W is the weight that training saw, up to the rounding of the cast. It is not the original weight plus what
was learned: the quantization error that training worked around is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qosora import __version__
from qosora.checkpoint import TensorSpec
from qosora.config import COMPUTE_DTYPES
from qosora.errors import CheckpointError, ConfigError
from qosora.export.source import Layer, Source, Stored
from qosora.factorize import Factors
from qosora.folders import copy_files, local_folder, refuse_input_as_output, write_json
from qosora.plain import PlainModel, natural_order
from qosora.streaming import Progress, Unit, stream

__all__ = ["ExportReport", "export_merged"]


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        output: The folder written.
        base: The base as given.
        adapter: The adapter as given, or None.
        fingerprint: Of the base.
        dtype: Of the merged weights.
        merged_layers: Layers whose weights were dequantized.
        adapted_layers: Those of them that the adapter has vectors for.
        replaced: Other tensors that the adapter brought (`modules_to_save`).
        untied: Tensors that the base shares with another and the export does not, since only one was trained.
        tokenizer_from: The folder that the tokenizer was copied from, or None where there is none.
        tensor_count: Tensors written.
        total_bytes: Their bytes.
        shard_count: The files they lie in.
        wall_seconds: Time it took.
    """

    output: str
    base: str
    adapter: str | None
    fingerprint: str
    dtype: str
    merged_layers: int
    adapted_layers: int
    replaced: list[str]
    untied: list[str]
    tokenizer_from: str | None
    tensor_count: int
    total_bytes: int
    shard_count: int
    wall_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def export_merged(
    base: str | Path,
    output: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 1_000_000_000,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Write a base, with an adapter merged into it, as a plain checkpoint of dequantized weights.

    Carried along are the tokenizer of the adapter's folder, or else of the base's, and the base's generation config and
    licence. Code (`*.py`) is carried only with `trust_remote_code`: without it nothing would run it.

    Args:
        base: Folder or hub id of a qosora base.
        output: Folder to make.
        adapter: Folder or hub id of an adapter; without one the base is exported as it is.
        dtype: "bfloat16", "float16" or "float32" (or the torch dtype) of the result; by default the base's. Tensors
            that the model class keeps in float32 stay as they are.
        max_shard_bytes: Size of the output's shards.
        overwrite: Whether a model in `output` may be replaced; it stays as it is until the new one is complete.
        restart: Whether to throw away what an unfinished call has left, from where this one would go on.
        trust_remote_code: Whether to run model code that the base brings.
        progress: Called at the start and after each tensor.

    Raises:
        CheckpointError: If base, adapter or output cannot be used, or a weight does not fit into `dtype`.
        ConfigError: If `dtype` or `max_shard_bytes` makes no sense.
        FingerprintError: If the adapter was trained on another base.

    Example:
        >>> export_merged("llama-2-7b-qosora", "llama-2-7b-tuned", "runs/gsm8k/adapter")
    """
    start = time.perf_counter()
    target = _checked_options(dtype, max_shard_bytes)
    base_folder = local_folder(base, trust_remote_code=trust_remote_code)
    adapter_folder = None if adapter is None else local_folder(adapter)
    refuse_input_as_output(output, base_folder, adapter_folder)
    with Source(base_folder, adapter_folder, trust_remote_code=trust_remote_code) as source:
        merged_dtype = target or source.dtype
        plan = _plan(source, target)
        notes: dict[str, Any] = {}

        def finish(folder: Path, _: Mapping[str, Any]) -> dict[str, Any]:
            notes["tokenizer"] = copy_files(folder, base_folder, adapter_folder, with_code=trust_remote_code)
            _write_config(folder, source, merged_dtype, trust_remote_code)
            return {"base": str(base), "adapter": None if adapter is None else str(adapter), "made_with": job}

        job = {"fingerprint": source.fingerprint, "dtype": str(merged_dtype), "qosora": __version__}
        stream(
            output,
            plan,
            finish,
            job=job,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            restart=restart,
            progress=progress,
        )
        return ExportReport(
            output=str(output),
            base=str(base),
            adapter=None if adapter is None else str(adapter),
            fingerprint=source.fingerprint,
            dtype=str(merged_dtype).removeprefix("torch."),
            merged_layers=len(source.layers),
            adapted_layers=len(source.vectors),
            replaced=natural_order(disk for disk, stored in source.tensors.items() if stored.trained),
            untied=source.untied,
            tokenizer_from=notes["tokenizer"],
            tensor_count=len(plan),
            total_bytes=sum(spec.nbytes for unit in plan for spec in unit.specs.values()),
            shard_count=len(list(Path(output).glob("*.safetensors"))),
            wall_seconds=time.perf_counter() - start,
        )


def _plan(source: Source, target: torch.dtype | None) -> list[Unit]:
    """Return what the export consists of, layer by layer."""
    units = {}
    for disk, stored in source.tensors.items():
        dtype = stored.dtype
        if target is not None and dtype.is_floating_point and not source.plain.keeps_float32(stored.name, target):
            dtype = target
        units[disk] = _copied(disk, stored, dtype)
    for layer in source.layers.values():
        units[f"{layer.disk}.weight"] = _merged(source, layer, target or source.dtype)
    return [units[name] for name in natural_order(units)]


def _copied(disk: str, stored: Stored, dtype: torch.dtype) -> Unit:
    def make(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {disk: _cast(disk, tensor, dtype) if stored.trained or tensor.dtype != dtype else tensor}, {}

    return Unit(disk, {disk: TensorSpec(dtype, stored.shape)}, 1.0, stored.files, stored.read, make)


def _merged(source: Source, layer: Layer, dtype: torch.dtype) -> Unit:
    name, shape = f"{layer.disk}.weight", (layer.out_features, layer.in_features)

    def make(factors: Factors) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        weight = _cast(name, source.merged(layer, factors), dtype)
        return {name: weight.T if layer.transposed else weight}, {}

    spec = TensorSpec(dtype, shape[::-1] if layer.transposed else shape)
    return Unit(name, {name: spec}, 1.0, source.files(layer), lambda: source.factors(layer), make)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype)
    if not dtype.is_floating_point or not cast.numel() or all(map(torch.isfinite, torch.aminmax(cast))):
        return cast
    if torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{name}: its largest value, {float(tensor.abs().max()):.4g}, does not fit into {dtype}, which ends at "
            f"{torch.finfo(dtype).max:.4g}; export in bfloat16 or float32"
        )
    raise CheckpointError(f"{name} holds NaN or infinity: the base is damaged, or the training diverged")


def _checked_options(dtype: str | torch.dtype | None, max_shard_bytes: int) -> torch.dtype | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    problems = []
    if name is not None and name not in COMPUTE_DTYPES:
        problems.append(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {dtype!r}")
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        problems.append(f"max_shard_bytes must be an integer of at least 1, got {max_shard_bytes!r}")
    if problems:
        raise ConfigError(problems)
    return None if name is None else getattr(torch, name)


def _write_config(folder: Path, source: Source, dtype: torch.dtype, with_code: bool) -> None:
    config = dict(source.config)
    for key in ("quantization_config", "torch_dtype", *([] if with_code else ["auto_map"])):
        config.pop(key, None)
    config["dtype"] = name = str(dtype).removeprefix("torch.")
    for key, value in config.items():  # the text model of a multimodal one
        if isinstance(value, dict) and "dtype" in value:
            config[key] = {**value, "dtype": name}
    if source.untied:
        config["tie_word_embeddings"] = False
        for key, value in config.items():
            if isinstance(value, dict) and "tie_word_embeddings" in value:
                config[key] = {**value, "tie_word_embeddings": False}
    write_json(folder / "config.json", config)
    if source.untied:
        plain = PlainModel(folder, with_code)
        names = {stored.name for stored in source.tensors.values()} | {f"{module}.weight" for module in source.layers}
        tied = [source.tensors[disk].name for disk in source.untied if plain.tied_to(source.tensors[disk].name)]
        if tied or plain.missing(names):
            raise CheckpointError(
                f"{source.adapter} trains one of some tied tensors apart from the others ({', '.join(source.untied)}), "
                f"but a {plain.class_name} cannot have them apart, so a plain checkpoint cannot hold this adapter"
            )

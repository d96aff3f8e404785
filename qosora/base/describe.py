"""What a folder holds: a base or an adapter, told from its files without loading the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qosora.base.layout import PlainModel
from qosora.base.reports import by_kind
from qosora.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    CONFIG_NAME,
    MANIFEST_NAME,
    TAGS,
    TEXTS,
    CheckpointReader,
    adapter_config,
    eight_bit_scales,
    expanded,
    group_modules,
    read_json,
    read_manifest,
    recorded_files,
    require_base,
    require_finite,
    require_intact,
    split_source,
    stored_fingerprint,
    task_of,
    verify_files,
)
from qosora.compat.transformers import unexpected_tensors
from qosora.config import QosoraConfig
from qosora.decompose import parts
from qosora.errors import CheckpointError

__all__ = ["describe", "verify"]


def describe(folder: str | Path) -> dict[str, Any]:
    """Describe a base or an adapter.

    Args:
        folder: Of a base or an adapter.

    Returns:
        Plain data; `kind` is "base" or "adapter".

    Raises:
        CheckpointError: If it is neither.
    """
    folder = Path(expanded(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        return _describe_adapter(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder}: neither {CONFIG_NAME} nor {ADAPTER_CONFIG} there; name a base or an adapter")
    return _describe_base(folder)


def verify(folder: str | Path, *, base: str | Path | None = None) -> dict[str, Any]:
    """Read every byte of a folder and compare it with its manifest; of an adapter its base, too.

    Args:
        folder: Of a base, an adapter or an export.
        base: The adapter's base, where it is not where the adapter says.

    Returns:
        `files`: how many were compared, by folder; `problems`: a sentence for each that is another; `fingerprint`: of
        the base, where an adapter belongs to it.

    Raises:
        CheckpointError: If there is no manifest.
    """
    base, adapter = split_source(folder, base)
    folders = [Path(part) for part in (adapter, base) if part is not None and Path(part).is_dir()]
    found: dict[str, Any] = {"files": {}, "problems": [], "fingerprint": None}
    for part in folders:
        if not (recorded := recorded_files(part)):
            raise CheckpointError(f"{part} has no {MANIFEST_NAME} and no hashes elsewhere: nothing to compare it with")
        bad = verify_files(part)
        found["files"][str(part)] = len(recorded)
        found["problems"] += [text if len(folders) == 1 else f"{part}: {text}" for text in bad]
    if adapter is not None and Path(base).is_dir() and not found["problems"]:
        with CheckpointReader(base) as reader:
            there, expected = stored_fingerprint(reader), adapter_config(adapter).base_fingerprint
        if there != expected:
            found["problems"].append(f"the adapter was trained on the base with fingerprint {expected}, not {there}")
        else:
            found["fingerprint"] = there
    return found


def _describe_base(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG_NAME)
    storage = require_base(folder, config)
    require_intact(folder)
    sizes = {"factors_bytes": 0, "residual_bytes": 0, "other_bytes": 0}
    with CheckpointReader(folder) as reader:
        modules = group_modules(reader.names())
        part_of = {name: _part(name, module) for module, names in modules.items() for name in names}
        plain = None if any(folder.glob("*.py")) else PlainModel(folder, trust_remote_code=False)
        adapted = {name for name in modules if not _is_of_vocabulary(name, reader, config, plain)}
        adapter_entries = 0
        for name in reader.names():
            entries = math.prod(reader.shape(name))
            sizes[part_of.get(name, "other_bytes")] += entries * reader.dtype(name).itemsize
            module, _, key = name.rpartition(".")
            if module in adapted and key in ("s", "o"):
                adapter_entries += entries
        fingerprint = stored_fingerprint(reader)
        scales = {*eight_bit_scales(reader).values()} if storage.get("embeddings") == "8bit" else set()
        _refuse_what_does_not_fit(folder, reader, modules, scales, QosoraConfig.from_dict(storage), plain)
        _refuse_impossible(folder, reader, [*part_of, *scales])
    manifest = read_manifest(folder)
    return {
        "kind": "base",
        "folder": str(folder),
        "architecture": next(iter(_texts(config.get("architectures"))), "unknown"),
        "quantization": {k: v for k, v in storage.items() if k != "quant_method"},
        "decomposed_layers": len(modules),
        "adapted_layers": len(adapted),
        "fingerprint": fingerprint,
        **sizes,
        "total_bytes": sum(sizes.values()),
        "adapter_parameters": adapter_entries,
        "adapter_bytes": 4 * adapter_entries,
        "labels": _labels(plain),
        "by_kind": _errors_by_kind(folder, manifest),
    }


def _labels(plain: PlainModel | None) -> list[str]:
    """Return the classes of a classifier."""
    if plain is None or task_of(plain.model.config) not in (TEXTS, TAGS):
        return []
    return [str(name) for name in plain.model.config.id2label.values()]


def _is_of_vocabulary(
    module: str, reader: CheckpointReader, config: Mapping[str, Any], plain: PlainModel | None
) -> bool:
    """Say whether a decomposed layer is the embeddings or the output layer, which have no vectors to train."""
    if plain is None:  # with code of its own, which is not run for a look
        return f"{module}.o" in reader and reader.shape(f"{module}.o") == (config.get("vocab_size"),)
    return plain.locate(f"{module}.weight")[0] in plain.vocabulary


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _errors_by_kind(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, float]] | None:
    try:
        return by_kind(manifest["layers"]) if "layers" in manifest else None
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME}: layers must hold the errors of each layer ({type(error).__name__}); get "
            "another copy"
        ) from error


def _part(name: str, module: str) -> str:
    return "residual_bytes" if name.removeprefix(f"{module}.").startswith("weight") else "factors_bytes"


def _refuse_what_does_not_fit(
    folder: Path,
    reader: CheckpointReader,
    modules: Mapping[str, Iterable[str]],
    scales: set[str],
    storage: QosoraConfig,
    plain: PlainModel | None,
) -> None:
    """Raise CheckpointError where a tensor of the model or of a decomposed layer is not there, or of another shape."""
    stored = {f"{module}.weight": set(names) for module, names in modules.items()}
    fields = {name for part in parts.PARTS for name in parts.stored_names(part, storage.double_quant)}
    fields |= {"s", "o", *(["c"] if storage.scale else [])}
    missing = [f"{weight.removesuffix('weight')}{key}" for weight, names in stored.items() for key in fields
               if f"{weight.removesuffix('weight')}{key}" not in names]  # fmt: skip
    if plain is not None:
        others = set(reader.names()) - {name for names in stored.values() for name in names} - scales
        missing += plain.missing(part for name in (*others, *stored) for part in plain.locate(name)[1])
        _refuse_others(folder, reader, others, plain)
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, among them {min(missing)}; get another copy"
        )
    if plain is None:
        return
    for module in modules:
        name = plain.locate(f"{module}.weight")[0]
        if len(shape := plain.shapes.get(name, ())) != 2:
            continue
        out_features, in_features = shape[::-1] if name.removesuffix(".weight") in plain.transposed else shape
        rank = math.prod(reader.shape(f"{module}.s"))
        expected = parts.stored_shapes(out_features, in_features, rank, storage.blocksize, storage.double_quant)
        expected |= {
            "o": ((out_features,), torch.float32),
            **({"c": ((in_features,), torch.float32)} if storage.scale else {}),
        }
        for key, (size, dtype) in expected.items():
            got = reader.shape(f"{module}.{key}"), reader.dtype(f"{module}.{key}")
            if got != (size, dtype):
                raise CheckpointError(
                    f"{folder}: {module}.{key} must be {size}, {dtype}, got {got[0]}, {got[1]}; get another copy"
                )


def _refuse_others(folder: Path, reader: CheckpointReader, names: Iterable[str], plain: PlainModel) -> None:
    """Raise CheckpointError where a tensor that is not decomposed has no place in the model, or another shape."""
    places = {name: plain.locate(name) for name in names}
    homeless = [name for name, (_, found) in places.items() if not set(found) & plain.shapes.keys()]
    for name in sorted(unexpected_tensors(plain.model, homeless)):
        raise CheckpointError(f"{folder}: {name} has no place in a {plain.class_name}; get another copy")
    for name, (place, found) in places.items():
        shape = plain.shapes.get(place)
        if found == [place] and shape is not None and reader.shape(name) != shape:
            raise CheckpointError(
                f"{folder}: {name} must have shape {shape}, got {reader.shape(name)}; get another copy"
            )


def _refuse_impossible(folder: Path, reader: CheckpointReader, names: Iterable[str]) -> None:
    """Raise CheckpointError where a vector is none, or it or a statistic of blocks is not finite."""
    for name in names:
        if name.rpartition(".")[2].removeprefix("osora_") in ("s", "o", "c") and len(reader.shape(name)) != 1:
            raise CheckpointError(
                f"{folder}: {name} must be a vector, got shape {reader.shape(name)}; get another copy"
            )
        if reader.dtype(name).is_floating_point:
            require_finite(f"{folder}: {name}", reader.tensor(name), "the file is damaged; get another copy")


def _describe_adapter(folder: Path) -> dict[str, Any]:
    config = adapter_config(folder)
    require_intact(folder)
    with CheckpointReader(folder, ADAPTER_STEM) as reader:
        shapes = {name: reader.shape(name) for name in reader.names()}
        trained = ("osora_s", "osora_o", "osora_A", "osora_B")
        vectors = {n: s for n, s in shapes.items() if n.rpartition(".")[2] in trained}
        layers = {name.rpartition(".")[0] for name in shapes if ".osora_" in name or name.rpartition(".")[2] not in (
            "weight", "bias")}  # fmt: skip
        kinds = {"both": trained[:2], "s": trained[:1], "o": trained[1:2]}[config.vectors]
        kinds += trained[2:] if config.update_rank else ()
        if missing := [
            f"{layer}.{kind}" for layer in sorted(layers) for kind in kinds if f"{layer}.{kind}" not in shapes
        ]:
            raise CheckpointError(
                f"{folder}: {len(missing)} tensors are missing, among them {missing[0]}; get another copy"
            )
        _refuse_impossible(folder, reader, vectors)
    return {
        "kind": "adapter",
        "folder": str(folder),
        "base": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "vectors": config.vectors,
        "update_rank": config.update_rank,
        "adapted_layers": len({n.rpartition(".")[0] for n in vectors}),
        "adapter_parameters": sum(math.prod(s) for s in vectors.values()),
        "modules_to_save": config.modules_to_save,
        "other_parameters": sum(math.prod(s) for n, s in shapes.items() if n not in vectors),
        "file_bytes": sum(f.stat().st_size for f in folder.glob(f"{ADAPTER_STEM}*.safetensors")),
    }

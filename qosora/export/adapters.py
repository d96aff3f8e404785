"""Adapters as files: read, checked against the base that they are for, and combined."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qosora.base import TABLE_OF_TOKENS, PlainModel
from qosora.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    CheckpointReader,
    StoredSpec,
    adapter_config,
    local_folder,
    require_finite,
)
from qosora.compat.peft import check_target_module_exists
from qosora.config import OsoraConfig
from qosora.errors import CheckpointError, ConfigError, FingerprintError

__all__ = ["TOKENS", "Adapter", "AdapterChoice", "Vectors", "combined", "read_adapter", "weighted"]

#: An adapter, or several with their weights.
AdapterChoice = str | Path | Mapping[str, float] | Mapping[Path, float]
#: s (rank,) and o (out_features,), float32.
Vectors = tuple[torch.Tensor, torch.Tensor]
#: B (out_features, k) and A (k, in_features), float32.
Update = tuple[torch.Tensor, torch.Tensor]

#: Ids of tokens, and what was trained of each (ids, width).
Rows = tuple[list[int], torch.Tensor]

#: What PEFT puts before the names of a model's tensors.
PEFT_PREFIX = "base_model.model."
_COPY = ".modules_to_save."
TOKENS = ".token_adapter.trainable_tokens_delta"
_TRAINED = {"both": {"s", "o"}, "s": {"s"}, "o": {"o"}}
_UPDATE = {"A", "B"}
_KINDS = _TRAINED["both"] | _UPDATE


@dataclass(frozen=True)
class Adapter:
    """An adapter of a base.

    Attributes:
        folder: Of its files.
        config: Its config.
        vectors: By module name: "s" (rank,) and "o" (out_features,), float32, where trained.
        updates: By module name: B and A of an update, where there is one.
        full: Tensors that were trained in full (`modules_to_save`), by name in the model: what they are, how to read.
        tokens: Rows of embeddings that were trained, by module name: their ids, and the rows (ids, width).
        files: That all of these are read from.
    """

    folder: Path
    config: OsoraConfig
    vectors: dict[str, dict[str, torch.Tensor]]
    updates: dict[str, Update]
    full: dict[str, tuple[StoredSpec, Callable[[], torch.Tensor]]]
    tokens: dict[str, Rows]
    files: tuple[Path, ...]


def weighted(choice: AdapterChoice | None) -> list[tuple[Path, float]]:
    """Return adapters' folders with their weights.

    Raises:
        CheckpointError: If there is no such folder.
        ConfigError: If a weight is no finite number.
    """
    pairs = choice.items() if isinstance(choice, Mapping) else [] if choice is None else [(choice, 1.0)]
    for name, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"the weight of an adapter must be a finite number, got {weight!r} for {name}")
    return [(local_folder(name), float(weight)) for name, weight in pairs]


def read_adapter(
    stack: ExitStack,
    folder: Path,
    base: Path,
    fingerprint: str,
    plain: PlainModel,
    sizes: Mapping[str, tuple[int, int, int]],
) -> Adapter:
    """Open an adapter and read its vectors.

    Args:
        stack: Closes its files.
        folder: Of the adapter.
        base: Its base, for messages.
        fingerprint: Of the base.
        plain: The plain model.
        sizes: The base's layers: (out_features, in_features, rank) by module name.

    Raises:
        CheckpointError: If it is not whole, or does not fit the base.
        FingerprintError: If it was trained on another base.
    """
    config = adapter_config(folder)
    if config.base_fingerprint not in (None, fingerprint):
        raise FingerprintError(
            f"{folder} was trained on the base with fingerprint {config.base_fingerprint}, but {base} has "
            f"{fingerprint}: another model, rank or decomposition. Give the base it was trained on (its "
            f"{ADAPTER_CONFIG} names {config.base_model_name_or_path!r})"
        )
    reader = stack.enter_context(CheckpointReader(folder, ADAPTER_STEM))
    trained: dict[str, dict[str, torch.Tensor]] = {}
    full: dict[str, tuple[StoredSpec, Callable[[], torch.Tensor]]] = {}
    tokens: dict[str, Rows] = {}
    names = {key.removeprefix(PEFT_PREFIX): key for key in reader.names()}
    for key in names.values():
        name = key.removeprefix(PEFT_PREFIX)
        if name.endswith(f".{TABLE_OF_TOKENS}"):
            name = f"{name.removesuffix(TABLE_OF_TOKENS)}weight"
        plain_name, copy, _ = name.replace(".original_module.", _COPY).partition(_COPY)
        if copy and f"{plain_name}.{name.rpartition('.')[2]}" in names:
            continue  # PEFT saves embeddings of another size once more as what its wrapper holds
        module, found, kind = name.rpartition(".osora_")
        if found:
            if module not in sizes or kind not in _KINDS:
                raise CheckpointError(f"{folder}: {key} adapts no decomposed layer of {base}")
            m, n, rank = sizes[module]
            k = min(config.update_rank, m, n)
            shapes: dict[str, tuple[int, ...]] = {"s": (rank,), "o": (m,), "A": (k, n), "B": (m, k)}
            trained.setdefault(module, {})[kind] = _trained(reader, key, shapes[kind])
        elif name.endswith(TOKENS):
            tokens[name.removesuffix(TOKENS)] = _rows(reader, key, name.removesuffix(TOKENS), config, plain)
        elif plain.shapes.get(name) == reader.shape(key):
            full[name] = StoredSpec(reader.dtype(key), reader.shape(key)), partial(reader.tensor, key)
        elif name in plain.shapes:
            raise CheckpointError(
                f"{folder}: {key} has shape {reader.shape(key)}, but config.json makes it {plain.shapes[name]}; they "
                "belong to different models"
            )
        else:
            raise CheckpointError(f"{folder}: {key} is neither a vector of qosora's nor a tensor of {plain.class_name}")
    _check_whole(folder, config, trained, sizes)
    vectors = {module: {kind: t for kind, t in own.items() if kind in "so"} for module, own in trained.items()}
    updates = {module: (own["B"], own["A"]) for module, own in trained.items() if own.keys() >= {"A", "B"}}
    files = tuple(dict.fromkeys(reader.file(key) for key in reader.names()))
    return Adapter(folder, config, vectors, updates, full, tokens, files)


def _rows(reader: CheckpointReader, key: str, module: str, config: OsoraConfig, plain: PlainModel) -> Rows:
    """Return the trained rows of a module's embeddings."""
    ids: Any = config.trainable_token_indices or []
    if isinstance(ids, dict):
        ids = next((found for name, found in ids.items() if f".{module}".endswith(f".{name}")), [])
    rows, width = plain.shapes.get(f"{module}.weight", (0, 0))
    if not ids or max(ids) >= rows:
        raise CheckpointError(
            f"{reader.folder}: {key} has rows of {module}, of which its {ADAPTER_CONFIG} names {ids or 'none'} and "
            f"{plain.class_name} has {rows}; get the whole adapter"
        )
    return list(ids), _trained(reader, key, (len(ids), width))


def _trained(reader: CheckpointReader, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = reader.tensor(key).float()
    if tensor.shape != shape:
        raise CheckpointError(f"{reader.folder}: {key} has shape {tuple(tensor.shape)}, the base wants {shape}")
    why = "its training diverged. Take an earlier checkpoint, or train again with a lower learning rate"
    return require_finite(f"{reader.folder}: {key}", tensor, why)


def _check_whole(
    folder: Path,
    config: OsoraConfig,
    trained: Mapping[str, Mapping[str, torch.Tensor]],
    modules: Mapping[str, object],
) -> None:
    """Refuse an adapter that lacks a tensor which its config says it has."""
    wanted = _TRAINED[config.vectors] | (_UPDATE if config.update_rank else set())
    for module in modules:
        lacking = sorted(wanted - set(trained.get(module, {})))
        if lacking and (config.target_modules is None or check_target_module_exists(config, module)):
            raise CheckpointError(
                f"{folder}: no {' and '.join(lacking)} for {module}, which its {ADAPTER_CONFIG} says it "
                "adapts; get the whole adapter"
            )


def combined(
    adapters: Sequence[Adapter], weights: Sequence[float], base_vectors: Mapping[str, Vectors]
) -> dict[str, Vectors]:
    """Return the vectors of a linear combination, for the layers that it adapts.

        s = s_base + Σ weight_i (s_i - s_base)        and o likewise

    One adapter with weight 1 gives its own vectors, bit for bit.

    Raises:
        CheckpointError: If one of several, or one with another weight than 1, has tensors that were trained in full.
    """
    if len(adapters) == 1 and weights[0] == 1.0:
        return {
            module: (own.get("s", base_vectors[module][0]), own.get("o", base_vectors[module][1]))
            for module, own in adapters[0].vectors.items()
        }
    if in_full := next((a for a in adapters if a.full or a.tokens), None):
        brought = min([*in_full.full, *in_full.tokens])
        raise CheckpointError(
            f"{in_full.folder} brings {brought}, trained in full: only vectors are combined. Export this adapter by "
            "itself, with weight 1"
        )
    found = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.vectors):
        pair = []
        for kind, base in zip(("s", "o"), base_vectors[module], strict=True):
            total = base.double()
            for adapter, weight in zip(adapters, weights, strict=True):
                if kind in adapter.vectors.get(module, {}):
                    total = total + weight * (adapter.vectors[module][kind].double() - base.double())
            pair.append(total.float())
        found[module] = (pair[0], pair[1])
    return found


def combined_updates(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Update]:
    """Return Σ weight_i B_i A_i as one B and A for each layer that has an update."""
    found: dict[str, Update] = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.updates):
        parts = [(w, *a.updates[module]) for a, w in zip(adapters, weights, strict=True) if module in a.updates]
        found[module] = torch.cat([w * B for w, B, _ in parts], 1), torch.cat([A for _, _, A in parts])
    return found

"""A base and adapters as files: checked against each other and against the plain model, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qosora.base import PlainModel, natural_order, rows_brought
from qosora.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    CONFIG_NAME,
    CheckpointReader,
    eight_bit_scales,
    group_modules,
    read_json,
    require_base,
    require_intact,
    stored_fingerprint,
)
from qosora.config import QosoraConfig
from qosora.decompose import Factors, FourBitTensor, int8, nf4, parts, reconstruct
from qosora.dtypes import dtype_name
from qosora.errors import CheckpointError
from qosora.export.adapters import Adapter, Vectors, combined, combined_updates, read_adapter
from qosora.layers import embedding_name

__all__ = ["AdaptedBase", "Layer", "Stored"]


@dataclass(frozen=True)
class Stored:
    """A tensor that is not decomposed.

    Attributes:
        name: In the model.
        shape: Of the tensor.
        dtype: That the base holds it in; where that is int8, the base's own.
        read: Returns it.
        files: That it is read from.
        trained: Whether it is the adapter's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    files: tuple[Path, ...]
    trained: bool = False


@dataclass(frozen=True)
class Layer:
    """A decomposed layer.

    Attributes:
        module: Its name in the model.
        disk: Its name on disk.
        out_features: m.
        in_features: n.
        rank: r.
        transposed: Whether a plain checkpoint stores its weight as (in_features, out_features).
    """

    module: str
    disk: str
    out_features: int
    in_features: int
    rank: int
    transposed: bool

    @property
    def size(self) -> tuple[int, int, int]:
        """(out_features, in_features, rank), as `decompose.parts` takes it."""
        return self.out_features, self.in_features, self.rank


class AdaptedBase:
    """A base, and adapters if given. Use as a context manager.

    Args:
        base: Folder of a qosora base.
        adapters: Folders of adapters, with their weights in a linear combination.
        trust_remote_code: Whether to run model code that the base brings.

    Attributes:
        config: The base's `config.json`.
        dtype: Of the base.
        fingerprint: Of the base.
        plain: The plain model.
        layers: The decomposed layers, by module name.
        tensors: The other tensors, by name on disk; the adapter's where it brings one.
        adapters: The adapters.
        weights: Theirs, in the combination.
        folders: Theirs, with the weights.
        scales: What the layers multiply their inputs by, c (in_features,) float32 or None, by module name.
        base_vectors: The base's own vectors, by module name.
        vectors: The adapters' vectors, combined, by the names of the modules that they adapt.
        updates: The adapters' updates, combined: B (out_features, k) and A (k, in_features) by module name.
        vocabulary: Rows of the embeddings that an adapter brings, where the base has others.
        untied: Tensors that the base shares with another and the adapted model does not, by name on disk.

    Raises:
        CheckpointError: If one of them is not whole, or they do not fit.
        FingerprintError: If an adapter was trained on another base.
    """

    def __init__(
        self, base: Path, adapters: Sequence[tuple[Path, float]] = (), *, trust_remote_code: bool = False
    ) -> None:
        self.base = base
        require_intact(base)
        for folder, _ in adapters:
            require_intact(folder)
        self.config, self.storage = _base_config(base)
        self.dtype = _dtype_in(self.config)
        with ExitStack() as stack:
            self._reader = stack.enter_context(CheckpointReader(base))
            self._groups = group_modules(self._reader.names())
            if not self._groups:
                raise CheckpointError(
                    f"{base}: config.json says qosora, but no layer is decomposed; make the base anew"
                )
            self.fingerprint = stored_fingerprint(self._reader)
            self.untied: list[str] = []
            self.plain = PlainModel(base, trust_remote_code)
            self.vocabulary = self._resized([folder for folder, _ in adapters])
            if self.vocabulary is not None:
                self.plain = PlainModel(base, trust_remote_code, self.vocabulary)
            self._locate()
            sizes = {module: layer.size for module, layer in self.layers.items()}
            self.adapters = [read_adapter(stack, f, base, self.fingerprint, self.plain, sizes) for f, _ in adapters]
            self.scales = {module: self._scale(layer) for module, layer in self.layers.items()}
            self.base_vectors = {module: self._own_vectors(layer) for module, layer in self.layers.items()}
            self.weights = [weight for _, weight in adapters]
            self.folders = {str(folder): weight for folder, weight in adapters}
            self.vectors = combined(self.adapters, self.weights, self.base_vectors)
            self.updates = combined_updates(self.adapters, self.weights)
            for adapter in self.adapters:
                self._take_full(adapter)
                self._take_rows(adapter)
            self._check_vocabulary()
            self._stack = stack.pop_all()

    def __enter__(self) -> AdaptedBase:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _scale(self, layer: Layer) -> torch.Tensor | None:
        return self._reader.tensor(f"{layer.disk}.c") if self.storage.scale else None

    def _own_vectors(self, layer: Layer) -> Vectors:
        return self._reader.tensor(f"{layer.disk}.s"), self._reader.tensor(f"{layer.disk}.o")

    def _resized(self, adapters: Sequence[Path]) -> int | None:
        """Return the rows of the embeddings that an adapter brings for tokens which were added before training."""
        name = embedding_name(self.plain.model)
        if name is None:
            return None
        for folder in adapters:
            with CheckpointReader(folder, ADAPTER_STEM) as reader:
                rows = rows_brought(reader, name)
                if rows not in (None, self.plain.shapes[f"{name}.weight"][0]):
                    return rows
        return None

    def _check_vocabulary(self) -> None:
        """Refuse embeddings and output layer of different sizes, as where an adapter brings only one of them."""
        for stored in self.tensors.values() if self.vocabulary is not None else ():
            if stored.shape != self.plain.shapes.get(stored.name, stored.shape):
                raise CheckpointError(
                    f"{self.adapters[0].folder} brings embeddings of {self.vocabulary} tokens, and {stored.name} has "
                    f"shape {stored.shape}: save the adapter with both (PEFT's save_embedding_layers)"
                )

    def _locate(self) -> None:
        """Find out what each tensor of the base is to the model, and refuse what does not fit."""
        packed = {name for names in self._groups.values() for name in names}
        scales = eight_bit_scales(self._reader) if self.storage.embeddings == "8bit" else {}
        located: set[str] = set()
        self.tensors: dict[str, Stored] = {}
        for disk in natural_order({*self._reader.names()} - packed - {*scales.values()}):
            name, targets = self.plain.locate(disk)
            shape = self._reader.shape(disk)
            if targets == [name] and not (self.vocabulary and shape[1:] == self.plain.shapes.get(name, shape)[1:]):
                self._check_shape(f"{self.base}: {disk}", name, shape)
            dtype, read = self._reader.dtype(disk), partial(self._reader.tensor, disk)
            if disk in scales:
                dtype, read = self.dtype, partial(self._eight_bit, disk, scales[disk])
            self.tensors[disk] = Stored(name, shape, dtype, read, (self._reader.file(disk),))
            located.update(targets)
        self.layers: dict[str, Layer] = {}
        for disk in natural_order(self._groups):
            name, targets = self.plain.locate(f"{disk}.weight")
            layer = self._layer(name.removesuffix(".weight"), disk)
            if targets == [name]:
                shape = (layer.out_features, layer.in_features)
                self._check_shape(f"{self.base}: {disk}", name, shape[::-1] if layer.transposed else shape)
            self.layers[layer.module] = layer
            located.update(targets)
        if missing := self.plain.missing(located):
            raise CheckpointError(
                f"{self.base}: {len(missing)} tensors that {self.plain.class_name} needs are missing, among them "
                f"{missing[0]!r}; get the whole base"
            )

    def _eight_bit(self, disk: str, scales: str) -> torch.Tensor:
        return int8.dequantize(self._reader.tensor(disk), self._reader.tensor(scales), self.dtype)

    def _check_shape(self, what: str, name: str, shape: tuple[int, ...]) -> None:
        expected = self.plain.shapes.get(name)
        if expected is not None and expected != shape:
            raise CheckpointError(
                f"{what} has shape {shape}, but config.json makes it {expected}; they belong to different models"
            )

    def _layer(self, module: str, disk: str) -> Layer:
        """Return a layer after checking, on the files' headers, that it is whole."""
        stored = {name.removeprefix(f"{disk}."): self._reader.shape(name) for name in self._groups[disk]}
        if lacking := [part for part in ("s", "o", "U", "V", "weight") if len(stored.get(part, ())) != 1]:
            raise CheckpointError(f"{self.base}: {disk}.{lacking[0]} is missing or no vector; get the whole base")
        (rank,), (m,) = stored["s"], stored["o"]
        expected = self.plain.shapes.get(f"{module}.weight", ())
        transposed = module in self.plain.transposed
        n = _in_features(stored["weight"][0], m, expected[0 if transposed else 1] if len(expected) == 2 else 0)
        layer = Layer(module, disk, m, n, rank, transposed)
        four_bit = parts.stored_shapes(*layer.size, self.storage.blocksize, self.storage.double_quant)
        for name, (_, dtype) in four_bit.items():
            if name in stored and (got := self._reader.dtype(f"{disk}.{name}")) != dtype:
                raise CheckpointError(
                    f"{self.base}: {disk}.{name} must be {dtype}, got {got}; get another copy of the base"
                )
        expected_shapes = {name: shape for name, (shape, _) in four_bit.items()}
        for name, size in (expected_shapes | ({"c": (n,)} if self.storage.scale else {})).items():
            if stored.get(name) != size:
                raise CheckpointError(
                    f"{self.base}: {disk}.{name} must have shape {size}, got {stored.get(name, 'nothing')}; "
                    "config.json and the weights belong to different bases"
                )
        return layer

    def _four_bit(self, layer: Layer, part: str) -> FourBitTensor:
        names = parts.stored_names(part, self.storage.double_quant)
        read = {name: self._reader.tensor(f"{layer.disk}.{name}") for name in names}
        shape = parts.shapes(*layer.size)[part]
        return parts.four_bit(part, read, shape, self.storage.quant_type, self.storage.blocksize)

    def factors(self, layer: Layer) -> Factors:
        """Read a layer's decomposition; its σ is the base's s."""
        residual = self._four_bit(layer, "residual")
        sigma = self.base_vectors[layer.module][0]
        return Factors(residual, *self.directions(layer), sigma, self.scales[layer.module])

    def directions(self, layer: Layer) -> tuple[FourBitTensor, FourBitTensor]:
        """Read a layer's Uᵀ (rank, out_features) and Vᵀ (rank, in_features)."""
        return self._four_bit(layer, "U"), self._four_bit(layer, "V")

    def merged(self, layer: Layer, factors: Factors) -> torch.Tensor:
        """Return the weight with what the adapters trained, (out_features, in_features), float32."""
        weight = reconstruct(factors, *self.vectors.get(layer.module, self.base_vectors[layer.module]))
        return weight.addmm_(*self.updates[layer.module]) if layer.module in self.updates else weight

    def low_rank(self, layer: Layer, U: FourBitTensor, V: FourBitTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the adapters add to a layer's weight, as B (out_features, r) and A (r, in_features), float32.

        B A = (diag(o) U diag(s) - U diag(σ)) Vᵀ diag(c), of the base's rank, and an update beside it. The base must be
        pristine.
        """
        sigma, ones = self.base_vectors[layer.module]
        s, o = self.vectors.get(layer.module, (sigma, ones))
        change = torch.outer(o.double(), s.double()) - sigma.double()  # small beside both: float32 would lose digits
        A, c = nf4.dequantize(V), self.scales[layer.module]
        B, A = change.mul_(nf4.dequantize(U).T).float(), A if c is None else A.mul_(c)
        if (update := self.updates.get(layer.module)) is None:
            return B, A
        return torch.cat([B, update[0]], 1), torch.cat([A, update[1]])

    def change_rank(self, layer: Layer) -> int:
        """Return the rank of what `low_rank` gives."""
        return layer.rank + (len(self.updates[layer.module][1]) if layer.module in self.updates else 0)

    def require_pristine(self) -> None:
        """Check that the base's own vectors are those of the decomposition: s = σ, which descends, and o = 1.

        Raises:
            CheckpointError: If an adapter was merged into the base: then σ is lost, and what the original was with it.
        """
        for module, (s, o) in self.base_vectors.items():
            if not (o == 1).all() or not (s.diff() <= 0).all():
                raise CheckpointError(
                    f"{self.base}: the vectors of {module} are not those of the decomposition, as an adapter was "
                    "merged into this base, so its difference from the original model is not known. Use the base that "
                    "`qosora quantize` made, or export merged weights onto dequantized ones"
                )

    def files(self, layer: Layer) -> tuple[Path, ...]:
        """Return the files that a layer, and the adapters' vectors, are read from."""
        own = dict.fromkeys(self._reader.file(name) for name in self._groups[layer.disk])
        return (*own, *(file for adapter in self.adapters for file in adapter.files))

    def _take_full(self, adapter: Adapter) -> None:
        """Replace tensors by those that were trained in full.

        Of tied tensors the base holds one. Where one of them was trained, PEFT trains a copy and the others keep the
        base's value: then the export holds each by itself.
        """
        base = {stored.name: (disk, stored) for disk, stored in self.tensors.items()}
        for name, (spec, read) in adapter.full.items():
            partners = self.plain.tied_to(name)
            known = [base[n] for n in (name, *partners) if n in base]
            if not known:
                raise CheckpointError(
                    f"{adapter.folder}: {name} was trained in full, but a plain checkpoint of {self.plain.class_name} "
                    "holds it in another form, which cannot be exported yet"
                )
            stored = known[0][1]
            self.tensors[self._disk_name(name)] = replace(
                stored, name=name, shape=spec.shape, read=read, files=adapter.files, trained=True
            )
            for partner in partners:
                self.tensors.setdefault(self._disk_name(partner), replace(stored, name=partner))
        on_disk = {disk for disk, _ in base.values()}
        for disk in sorted(set(self.tensors) - on_disk):
            mine = self.tensors[disk].read()
            other = self.tensors[self._disk_name(self.plain.tied_to(self.tensors[disk].name)[0])].read()
            if mine.dtype == other.dtype and torch.equal(mine, other):
                del self.tensors[disk]  # trained together, or not at all
            else:
                self.untied.append(disk)

    def _take_rows(self, adapter: Adapter) -> None:
        """Put trained rows into embeddings; an output layer that is tied to them has these, too."""
        for module, (ids, trained) in adapter.tokens.items():
            names = {f"{module}.weight", *self.plain.tied_to(f"{module}.weight")}
            disk = next((disk for disk, stored in self.tensors.items() if stored.name in names), None)
            if disk is None:
                raise CheckpointError(
                    f"{adapter.folder}: rows of {module} were trained, and {self.base} does not hold it in 16 bits"
                )
            stored = self.tensors[disk]

            def read(stored: Stored = stored, ids: list[int] = ids, trained: torch.Tensor = trained) -> torch.Tensor:
                whole = stored.read()
                return whole.index_copy(0, torch.tensor(ids), trained.to(whole.dtype))

            self.tensors[disk] = replace(stored, read=read, files=(*stored.files, *adapter.files), trained=True)

    def _disk_name(self, name: str) -> str:
        """Return the name on disk of a tensor, which a tied one has only in theory."""
        disk = next((disk for disk, stored in self.tensors.items() if stored.name == name), None)
        return disk or self.plain.disk_name(name)


def _base_config(base: Path) -> tuple[dict[str, Any], QosoraConfig]:
    if not (base / CONFIG_NAME).is_file() and (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{base} is an adapter; give its base, and it as the adapter")
    config = read_json(base / CONFIG_NAME)
    return config, QosoraConfig.from_dict(require_base(base, config))


def _dtype_in(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, dtype_name(name), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"config.json: dtype {name!r} is unknown")
    return dtype


def _in_features(packed: int, out_features: int, expected: int) -> int:
    """Return n of an (m, n) matrix in `packed` bytes, two values to a byte: n as expected if it fits, else what fits.

    Only for m = 1 do two n fit.
    """
    return expected if -(-out_features * expected // 2) == packed else 2 * packed // out_features

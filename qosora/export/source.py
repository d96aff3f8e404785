"""A base and an adapter as files: checked against each other and against the plain model, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists

from qosora import nf4
from qosora.checkpoint import CheckpointReader, group_modules, stored_fingerprint
from qosora.config import QUANT_METHOD, OsoraConfig, QosoraConfig
from qosora.errors import CheckpointError, FingerprintError
from qosora.factorize import Factors, reconstruct
from qosora.folders import read_json
from qosora.models import ADAPTER_CONFIG, adapter_config
from qosora.nf4 import FourBitTensor
from qosora.plain import PlainModel, natural_order

__all__ = ["Layer", "Source", "Stored"]

_PEFT_PREFIX = "base_model.model."
_TRAINED = {"both": {"s", "o"}, "s": {"s"}, "o": {"o"}}


@dataclass(frozen=True)
class Stored:
    """A tensor that is not decomposed.

    Attributes:
        name: In the model.
        shape: Of the tensor.
        dtype: That the base holds it in.
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

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of residual, Uᵀ and Vᵀ, by prefix of their tensors' names."""
        m, n, r = self.out_features, self.in_features, self.rank
        return {"weight": (m, n), "U": (r, m), "V": (r, n)}


class Source:
    """A base, and an adapter if given. Use as a context manager.

    Args:
        base: Folder of a qosora base.
        adapter: Folder of an adapter, or None.
        trust_remote_code: Whether to run model code that the base brings.

    Attributes:
        config: The base's `config.json`.
        dtype: Of the base.
        fingerprint: Of the base.
        plain: The plain model.
        layers: The decomposed layers, by module name.
        tensors: The other tensors, by name on disk; the adapter's where it brings one.
        vectors: The adapter's, by module name: "s" (rank,) and "o" (out_features,), float32, where trained.
        untied: Tensors that the base shares with another and the adapted model does not, by name on disk.

    Raises:
        CheckpointError: If one of them is not whole, or they do not fit.
        FingerprintError: If the adapter was trained on another base.
    """

    def __init__(self, base: Path, adapter: Path | None = None, *, trust_remote_code: bool = False) -> None:
        self.base, self.adapter = base, adapter
        self.config, self.storage = _base_config(base)
        self.dtype = _dtype_in(self.config)
        with ExitStack() as stack:
            self._open(stack, trust_remote_code)
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack, trust_remote_code: bool) -> None:
        base, adapter = self.base, self.adapter
        self._reader = stack.enter_context(CheckpointReader(base))
        self._groups = group_modules(self._reader.names())
        if not self._groups:
            raise CheckpointError(f"{base}: config.json says qosora, but no layer is decomposed; make the base anew")
        self.fingerprint = stored_fingerprint(self._reader)
        self.vectors: dict[str, dict[str, torch.Tensor]] = {}
        self.untied: list[str] = []
        self._adapter_files: tuple[Path, ...] = ()
        config = None if adapter is None else self._adapter_config(adapter)
        self.plain = PlainModel(base, trust_remote_code)
        self._locate()
        if adapter is not None and config is not None:
            reader = stack.enter_context(CheckpointReader(adapter, "adapter_model"))
            self._read_adapter(reader)
            self._check_whole(config)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _adapter_config(self, adapter: Path) -> OsoraConfig:
        config = adapter_config(adapter)
        if config.base_fingerprint not in (None, self.fingerprint):
            raise FingerprintError(
                f"{adapter} was trained on the base with fingerprint {config.base_fingerprint}, but {self.base} has "
                f"{self.fingerprint}: another model, rank or decomposition. Give the base it was trained on (its "
                f"{ADAPTER_CONFIG} names {config.base_model_name_or_path!r})"
            )
        return config

    def _locate(self) -> None:
        """Find out what each tensor of the base is to the model, and refuse what does not fit."""
        packed = {name for names in self._groups.values() for name in names}
        located: set[str] = set()
        self.tensors: dict[str, Stored] = {}
        for disk in natural_order(set(self._reader.names()) - packed):
            name, targets = self.plain.locate(disk)
            shape = self._reader.shape(disk)
            if targets == [name]:
                self._check_shape(f"{self.base}: {disk}", name, shape)
            self.tensors[disk] = Stored(
                name, shape, self._reader.dtype(disk), self._read(self._reader, disk), (self._reader.file(disk),)
            )
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

    @staticmethod
    def _read(reader: CheckpointReader, name: str) -> Callable[[], torch.Tensor]:
        return lambda: reader.tensor(name)

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
        for prefix, shape in layer.shapes().items():
            for field, (size, _) in self._fields(shape).items():
                part = prefix if field == "packed" else f"{prefix}_{field}"
                if stored.get(part) != size:
                    raise CheckpointError(
                        f"{self.base}: {disk}.{part} must have shape {size}, got {stored.get(part, 'nothing')}; "
                        "config.json and the weights belong to different bases"
                    )
        return layer

    def _fields(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return nf4.stored_shapes(shape[0] * shape[1], self.storage.blocksize, self.storage.double_quant)

    def _four_bit(self, layer: Layer, prefix: str) -> FourBitTensor:
        shape = layer.shapes()[prefix]
        read: dict[str, Any] = {"absmax_scale": None, "absmax_offset": None}
        for field in self._fields(shape):
            read[field] = self._reader.tensor(f"{layer.disk}.{prefix if field == 'packed' else f'{prefix}_{field}'}")
        return FourBitTensor(**read, shape=shape, quant_type=self.storage.quant_type, blocksize=self.storage.blocksize)

    def factors(self, layer: Layer) -> Factors:
        """Read a layer's decomposition; its σ is the base's s."""
        residual, U, V = (self._four_bit(layer, prefix) for prefix in ("weight", "U", "V"))
        return Factors(residual, U, V, self._reader.tensor(f"{layer.disk}.s"))

    def merged(self, layer: Layer, factors: Factors) -> torch.Tensor:
        """Return R + diag(o) U diag(s) Vᵀ with the adapter's vectors, (out_features, in_features), float32."""
        own = self.vectors.get(layer.module, {})
        o = own["o"] if "o" in own else self._reader.tensor(f"{layer.disk}.o")
        return reconstruct(factors, own.get("s"), o)

    def files(self, layer: Layer) -> tuple[Path, ...]:
        """Return the files that a layer, and the adapter's vectors, are read from."""
        return (*dict.fromkeys(self._reader.file(name) for name in self._groups[layer.disk]), *self._adapter_files)

    def _read_adapter(self, reader: CheckpointReader) -> None:
        full: dict[str, str] = {}
        for key in reader.names():
            name = key.removeprefix(_PEFT_PREFIX)
            module, found, kind = name.rpartition(".osora_")
            if found:
                self._take_vector(key, module, kind, reader)
            elif name in self.plain.shapes:
                self._check_shape(f"{self.adapter}: {key}", name, reader.shape(key))
                full[name] = key
            else:
                raise CheckpointError(
                    f"{self.adapter}: {key} is neither a vector of qosora's nor a tensor of {self.plain.class_name}"
                )
        self._adapter_files = tuple(dict.fromkeys(reader.file(key) for key in reader.names()))
        self._take_full({name: self._read(reader, key) for name, key in full.items()})

    def _take_vector(self, key: str, module: str, kind: str, reader: CheckpointReader) -> None:
        layer = self.layers.get(module)
        if layer is None or kind not in ("s", "o"):
            raise CheckpointError(f"{self.adapter}: {key} adapts no decomposed layer of {self.base}")
        vector, size = reader.tensor(key).float(), layer.rank if kind == "s" else layer.out_features
        if vector.shape != (size,):
            raise CheckpointError(f"{self.adapter}: {key} has shape {tuple(vector.shape)}, the base wants {(size,)}")
        if not torch.isfinite(vector).all():
            raise CheckpointError(
                f"{self.adapter}: {key} holds NaN or infinity: its training diverged. Take an earlier checkpoint, or "
                "train again with a lower learning rate"
            )
        self.vectors.setdefault(module, {})[kind] = vector

    def _take_full(self, full: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Replace tensors by those that were trained in full.

        Of tied tensors the base holds one. Where one of them was trained, PEFT trains a copy and the others keep the
        base's value: then the export holds each by itself.
        """
        base = {stored.name: (disk, stored) for disk, stored in self.tensors.items()}
        for name, read in full.items():
            partners = self.plain.tied_to(name)
            known = [base[n] for n in (name, *partners) if n in base]
            if not known:
                raise CheckpointError(
                    f"{self.adapter}: {name} was trained in full, but a plain checkpoint of {self.plain.class_name} "
                    "holds it in another form, which cannot be exported yet"
                )
            stored = known[0][1]
            self.tensors[self._disk_name(name)] = replace(
                stored, name=name, read=read, files=self._adapter_files, trained=True
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

    def _disk_name(self, name: str) -> str:
        """Return the name on disk of a tensor, which a tied one has only in theory."""
        disk = next((disk for disk, stored in self.tensors.items() if stored.name == name), None)
        return disk or self.plain.disk_name(name)

    def _check_whole(self, config: OsoraConfig) -> None:
        """Refuse an adapter that lacks a vector which its config says it has."""
        for module in self.layers:
            lacking = sorted(_TRAINED[config.vectors] - set(self.vectors.get(module, {})))
            if lacking and (config.target_modules is None or check_target_module_exists(config, module)):
                raise CheckpointError(
                    f"{self.adapter}: no {' and '.join(lacking)} for {module}, which its {ADAPTER_CONFIG} says it "
                    "adapts; get the whole adapter"
                )


def _base_config(base: Path) -> tuple[dict[str, Any], QosoraConfig]:
    if not (base / "config.json").is_file() and (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{base} is an adapter; give its base, and it as the adapter")
    config = read_json(base / "config.json")
    stored = config.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if not isinstance(stored, dict) or method != QUANT_METHOD:
        kind = "an ordinary checkpoint" if method is None else f"quantized with {method!r}"
        raise CheckpointError(f"{base} is {kind}, not a qosora base; give the folder that `qosora quantize` made of it")
    return config, QosoraConfig(**stored)


def _dtype_in(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"config.json: dtype {name!r} is unknown")
    return dtype


def _in_features(packed: int, out_features: int, expected: int) -> int:
    """Return n of an (m, n) matrix in `packed` bytes, two values to a byte: n as expected if it fits, else what fits.

    Only for m = 1 do two n fit.
    """
    return expected if -(-out_features * expected // 2) == packed else 2 * packed // out_features

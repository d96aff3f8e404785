"""Make a qosora base of a checkpoint: stream its tensors, decompose the linear weights, copy the rest.

Which tensors are decomposed is decided by the model class on the meta device, just as `from_pretrained` decides it, and
the result has the same tensors as `from_pretrained(..., quantization_config=...)` followed by `save_pretrained`. The
model itself is never built. Checkpoints that are no safetensors (GGUF, pickled weights) are first read by transformers
and written to a temporary folder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from qosora.checkpoint import INDEX_NAME, SINGLE_NAME, CheckpointReader, ShardWriter
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError
from qosora.factorize import factorize, measure_error
from qosora.folders import atomic_folder, copy_files, local_folder, refuse_input_as_output, write_json
from qosora.linear import QosoraLinear
from qosora.models import quantization_of
from qosora.plain import PlainModel, natural_order
from qosora.quantizer import QosoraHfQuantizer

__all__ = ["ConversionReport", "LayerReport", "quantize"]

REPORT_NAME = "qosora_report.json"


@dataclass(frozen=True)
class LayerReport:
    """One decomposed layer: its size, relative errors and cost.

    Attributes:
        name: Of the module in the model.
        shape: (out_features, in_features).
        rank: Of its factors.
        error: Relative Frobenius error of the decomposition.
        nf4_error: The same for the weight quantized as it is.
        bits_per_parameter: Stored bits per entry of the weight.
        nf4_bits_per_parameter: The same for the weight quantized as it is.
        seconds: Time for decomposing, quantizing and measuring.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    error: float
    nf4_error: float
    bits_per_parameter: float
    nf4_bits_per_parameter: float
    seconds: float


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: What was converted.
        layers: The decomposed layers.
        base_bytes: Bytes of all tensors written.
        seconds: Wall time of the whole conversion.
    """

    source: str
    layers: list[LayerReport]
    base_bytes: int
    seconds: float

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Return count, mean errors, mean bits per parameter and seconds by kind of layer (last part of the name)."""
        kinds: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
        return {
            kind: {
                "layers": len(group),
                "error": sum(r.error for r in group) / len(group),
                "nf4_error": sum(r.nf4_error for r in group) / len(group),
                "bits_per_parameter": sum(r.bits_per_parameter for r in group) / len(group),
                "nf4_bits_per_parameter": sum(r.nf4_bits_per_parameter for r in group) / len(group),
                "seconds": sum(r.seconds for r in group),
            }
            for kind, group in kinds.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "by_kind": self.by_kind()}


def quantize(
    source: str | Path,
    output: str | Path,
    config: QosoraConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_shard_bytes: int = 1_000_000_000,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[LayerReport, int, int], None] | None = None,
) -> ConversionReport:
    """Decompose a checkpoint into a qosora base.

    Args:
        source: Folder, hub id or GGUF file of a causal language model.
        output: Folder to make.
        config: Ranks and storage; `QosoraConfig()` by default.
        dtype: Of the tensors that are not decomposed; by default the checkpoint's, for GGUF bfloat16. The weights that
            are decomposed are read at the checkpoint's own precision.
        device: Where to decompose; the current GPU, or the CPU without one, by default.
        max_shard_bytes: Size of the output's shards, which is also what is held in memory.
        overwrite: Whether `output` may be replaced.
        trust_remote_code: Whether to run model code that the checkpoint brings.
        progress: Called after each layer with its report, the number done and the number of layers.

    Raises:
        CheckpointError: If the source cannot be read, is quantized already, or does not fit its model class.
        ConfigError: If there is no such device, or the config does not fit the model.
    """
    start = time.perf_counter()
    config = config or QosoraConfig()
    device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _as_safetensors(source, trust_remote_code) as origin, CheckpointReader(origin) as reader:
        refuse_input_as_output(output, Path(source) if Path(source).exists() else None, origin)
        plan = _Plan(origin, config, dtype, trust_remote_code)
        plan.match(reader)
        layers: list[LayerReport] = []
        with atomic_folder(output, overwrite=overwrite) as folder:
            writer = ShardWriter(folder, max_shard_bytes)
            for disk, name in plan.tensors.items():
                module, tensor = plan.layers.get(name), reader.tensor(disk)
                if module is None:
                    writer.add(disk, tensor.to(plan.dtype_of(name)) if tensor.is_floating_point() else tensor)
                    continue
                state, layer = _decompose(name, module, tensor.to(device), config)
                for key, part in state.items():
                    writer.add(disk.removesuffix("weight") + key, part.cpu())
                layers.append(layer)
                if progress:
                    progress(layer, len(layers), len(plan.layers))
            writer.close()
            report = ConversionReport(str(source), layers, writer.total_bytes, time.perf_counter() - start)
            copy_files(folder, origin, with_code=trust_remote_code)
            plan.config.save_pretrained(folder)
            write_json(folder / REPORT_NAME, report.to_dict())
    return report


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such kind, no such index, or a torch without CUDA
        raise ConfigError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _decompose(
    name: str, module: QosoraLinear, weight: torch.Tensor, config: QosoraConfig
) -> tuple[dict[str, torch.Tensor], LayerReport]:
    start = time.perf_counter()
    weight = weight.T if module.fan_in_fan_out else weight
    factors = factorize(weight, module.rank, name=name, **config.factorize_options())
    error = measure_error(weight, factors)
    shape = (module.out_features, module.in_features)
    layer = name.removesuffix(".weight")
    seconds = time.perf_counter() - start
    return module.state_of(factors), LayerReport(layer, shape, module.rank, **asdict(error), seconds=seconds)


class _Plan:
    """What becomes of each tensor: the model class on the meta device, with its linear layers replaced.

    Attributes:
        config: Of the base that is made.
        layers: The decomposed layers, by the name of their weight in the model.
        tensors: What to read, in order: name on disk -> name in the model. Names on disk stay.
    """

    def __init__(self, origin: Path, storage: QosoraConfig, dtype: torch.dtype | None, trust_remote_code: bool) -> None:
        self.origin = origin
        self.plain = PlainModel(origin, trust_remote_code)
        self.config: PreTrainedConfig = AutoConfig.from_pretrained(origin, trust_remote_code=trust_remote_code)
        self.dtype = self.config.dtype = dtype or self.config.dtype or torch.float32
        self.config.architectures = [self.plain.class_name]
        self.config.quantization_config = storage
        model = self.plain.model
        QosoraHfQuantizer(storage, pre_quantized=False)._process_model_before_weight_loading(model)
        self.layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, QosoraLinear)}
        self.tensors: dict[str, str] = {}

    def match(self, reader: CheckpointReader) -> None:
        """Find the model's tensors in a checkpoint.

        Raises:
            CheckpointError: If one is missing, or has another shape.
        """
        located: set[str] = set()
        for disk in natural_order(reader.names()):
            name, parts = self.plain.locate(disk)
            if not set(parts) & self.plain.shapes.keys():
                continue  # from_pretrained leaves out what the model has no place for, too
            located.update(parts)
            self.tensors[disk] = name
            if parts == [name]:
                self._check_shape(name, reader.shape(disk))
        if missing := self.plain.missing(located):
            raise CheckpointError(
                f"{self.origin}: {len(missing)} tensors that {self.plain.class_name} needs are not in the "
                f"checkpoint, among them {missing[0]!r}; get the whole checkpoint"
            )
        for disk, name in list(self.tensors.items()):
            if self.plain.tied.get(name) in located:  # a copy of the tensor that it is tied to
                del self.tensors[disk]

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = self.plain.shapes[name]
        if shape != expected:
            raise CheckpointError(
                f"{self.origin}: {name} has shape {shape}, but config.json makes it {expected}; "
                "config and weights belong to different models"
            )

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that the model holds a tensor in."""
        return torch.float32 if self.plain.keeps_float32(name, self.dtype) else self.dtype


@contextmanager
def _as_safetensors(source: str | Path, trust_remote_code: bool) -> Iterator[Path]:
    """Give a local folder with the source's weights as safetensors, for as long as it is needed."""
    path = Path(source)
    gguf = path.name if path.suffix == ".gguf" else None
    if gguf and not path.is_file():
        raise CheckpointError(f"{source}: no such file")
    folder = path.parent if gguf else local_folder(source, trust_remote_code=trust_remote_code)
    if not gguf:
        _refuse_quantized(folder, trust_remote_code)
        if (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file():
            yield folder
            return
    with tempfile.TemporaryDirectory(prefix="qosora-") as temporary:
        _resave(folder, gguf, Path(temporary), trust_remote_code)
        yield Path(temporary)


def _refuse_quantized(folder: Path, trust_remote_code: bool) -> None:
    stored = quantization_of(folder, trust_remote_code=trust_remote_code)
    if stored:
        raise CheckpointError(
            f"{folder} is quantized already ({stored.get('quant_method')}): what quantization lost cannot be "
            "decomposed. Use the original 16-bit checkpoint"
        )


def _resave(folder: Path, gguf: str | None, target: Path, trust_remote_code: bool) -> None:
    """Let transformers read weights in another format and write them as safetensors."""
    options: dict[str, Any] = {"gguf_file": gguf, "dtype": torch.float32} if gguf else {"dtype": "auto"}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        where = folder / gguf if gguf else folder
        raise CheckpointError(f"{where}: transformers cannot read the weights ({error})") from error
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(target)
    if gguf:  # read in float32 so that the decomposition starts there; the rest of the base is 16 bits
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(target)
    else:
        copy_files(target, folder, with_code=trust_remote_code)

"""Make a qosora base of a checkpoint: stream its tensors, decompose the linear weights, copy the rest.

Which tensors are decomposed is decided by the model class on the meta device, just as `from_pretrained` decides it, and
the result has the same tensors as `from_pretrained(..., quantization_config=...)` followed by `save_pretrained`. The
model itself is never built. Checkpoints that are no safetensors (GGUF, pickled weights) are first read by transformers
and written to a temporary folder.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qosora.checkpoint import INDEX_NAME, SINGLE_NAME, CheckpointReader, ShardWriter, atomic_folder, write_json
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError
from qosora.factorize import factorize, measure_error
from qosora.linear import QosoraLinear
from qosora.quantizer import QosoraHfQuantizer

__all__ = ["ConversionReport", "LayerReport", "quantize"]

REPORT_NAME = "qosora_report.json"
#: Files of a model folder that are not weights and that a model needs; never pickles.
_COPIED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", INDEX_NAME, "adapter_config.json", REPORT_NAME)


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
        seconds: Time for decomposing, quantizing and measuring.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    error: float
    nf4_error: float
    bits_per_parameter: float
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
    max_shard_bytes: int = 2_000_000_000,
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
    """
    start = time.perf_counter()
    config = config or QosoraConfig()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with atomic_folder(output, overwrite=overwrite) as folder, _as_safetensors(source, trust_remote_code) as origin:
        plan = _Plan(origin, config, dtype, trust_remote_code)
        writer = ShardWriter(folder, max_shard_bytes)
        layers: list[LayerReport] = []
        with CheckpointReader(origin) as reader:
            plan.match(reader.names())
            for name in plan.order:
                module, weight = plan.module_of(name), plan.checked(name, reader.tensor(plan.disk_name[name]))
                if module is None:
                    writer.add(plan.saved_name(name), weight.to(plan.dtype_of(name)))
                    continue
                state, layer = _decompose(name, module, weight.to(device), config)
                for key, tensor in state.items():
                    writer.add(plan.saved_name(name.removesuffix("weight") + key), tensor.cpu())
                layers.append(layer)
                if progress:
                    progress(layer, len(layers), plan.layer_count)
        writer.close()
        report = ConversionReport(str(source), layers, writer.total_bytes, time.perf_counter() - start)
        _write_rest(origin, folder, plan.config, config, report)
    return report


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
    """What becomes of each tensor: the model class on the meta device, with its linear layers replaced."""

    def __init__(self, origin: Path, config: QosoraConfig, dtype: torch.dtype | None, trust_remote_code: bool) -> None:
        self.config: PreTrainedConfig = AutoConfig.from_pretrained(origin, trust_remote_code=trust_remote_code)
        self.config.dtype = dtype or self.config.dtype or torch.float32
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config, dtype=self.config.dtype, trust_remote_code=trust_remote_code
            )
        self.config.architectures = [type(model).__name__]
        self.plain: dict[str, torch.Tensor] = model.state_dict()
        QosoraHfQuantizer(config, pre_quantized=False)._process_model_before_weight_loading(model)
        self.model, self.origin = model, origin
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._reverse = [t.reverse_transform() for t in reversed(self._renamings)]
        self.disk_name: dict[str, str] = {}
        self.order: list[str] = []
        self.layer_count = 0

    def match(self, names: list[str]) -> None:
        """Find the tensor on disk for every tensor of the model.

        Raises:
            CheckpointError: If one is missing.
        """
        for disk in names:
            name, converter = rename_source_key(
                disk, self._renamings, self._converters, self.model.base_model_prefix, self.plain
            )
            if converter is not None:
                raise CheckpointError(
                    f"{self.origin}: {disk} is stored in another form than {type(self.model).__name__} uses it in "
                    f"({name}), which cannot be streamed yet; use from_pretrained and save_pretrained"
                )
            if name in self.plain:
                self.disk_name[name] = disk
        tied = self.model.all_tied_weights_keys
        missing = [n for n in self.plain if n not in self.disk_name and tied.get(n) not in self.disk_name]
        persistent = dict(self.model.named_parameters()).keys() | dict(self.model.named_buffers()).keys()
        missing = [n for n in missing if n in persistent]
        if missing:
            raise CheckpointError(
                f"{self.origin}: {len(missing)} tensors that {type(self.model).__name__} needs are not in the "
                f"checkpoint, among them {missing[0]!r}; get the whole checkpoint"
            )
        self.order = [n for n in self.plain if n in self.disk_name and tied.get(n) not in self.disk_name]
        self.layer_count = sum(self.module_of(n) is not None for n in self.order)

    def module_of(self, name: str) -> QosoraLinear | None:
        """Return the layer that a tensor is the weight of, if it is to be decomposed."""
        if not name.endswith(".weight"):
            return None
        module = self.model.get_submodule(name.removesuffix(".weight"))
        return module if isinstance(module, QosoraLinear) else None

    def checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as it is.

        Raises:
            CheckpointError: If its shape is not the model's.
        """
        shape = self.plain[name].shape
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self.origin}: {name} has shape {tuple(tensor.shape)}, but config.json makes it {tuple(shape)}; "
                "config and weights belong to different models"
            )
        return tensor

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that the model holds a tensor in."""
        return self.plain[name].dtype

    def saved_name(self, name: str) -> str:
        """Return the name that `save_pretrained` gives a parameter."""
        return rename_source_key(name, self._reverse, [], reverse=True)[0]


def _write_rest(
    origin: Path, folder: Path, config: PreTrainedConfig, storage: QosoraConfig, report: ConversionReport
) -> None:
    for pattern in _COPIED:
        for file in origin.glob(pattern):
            if file.name not in _NOT_COPIED and file.is_file():
                shutil.copyfile(file, folder / file.name)
    config.quantization_config = storage
    config.save_pretrained(folder)
    write_json(folder / REPORT_NAME, report.to_dict())


@contextmanager
def _as_safetensors(source: str | Path, trust_remote_code: bool) -> Iterator[Path]:
    """Give a local folder with the source's weights as safetensors, for as long as it is needed."""
    path = Path(source)
    gguf = path.name if path.suffix == ".gguf" else None
    if gguf and not path.is_file():
        raise CheckpointError(f"{source}: no such file")
    folder = path.parent if gguf else path if path.is_dir() else _download(str(source))
    if not gguf:
        _refuse_quantized(folder, trust_remote_code)
        if (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file():
            yield folder
            return
    with tempfile.TemporaryDirectory(prefix="qosora-") as temporary:
        _resave(folder, gguf, Path(temporary), trust_remote_code)
        yield Path(temporary)


def _refuse_quantized(folder: Path, trust_remote_code: bool) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json, so this is no model folder")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    if stored:
        method = dict(stored).get("quant_method")
        raise CheckpointError(
            f"{folder} is quantized already ({method}): what quantization lost cannot be decomposed. "
            "Use the original 16-bit checkpoint"
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
    if gguf:
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)
    model.save_pretrained(target)
    if gguf:  # read in float32 so that the decomposition starts there; the rest of the base is 16 bits
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(target)
    else:
        for pattern in _COPIED:
            for file in folder.glob(pattern):
                if not (target / file.name).exists() and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, target / file.name)


def _download(repo: str) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.safetensors", *_COPIED], ignore_patterns=["original/*"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{repo}: neither a local folder nor a model that the hub gives ({str(error).splitlines()[0]})"
        ) from error

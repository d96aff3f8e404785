"""Make a qosora base of a checkpoint: stream its tensors, decompose the linear weights, copy the rest.

Which tensors are decomposed is decided by the model class on the meta device, just as `from_pretrained` decides it, and
the result has the same tensors as `from_pretrained(..., quantization_config=...)` followed by `save_pretrained`. The
model itself is never built.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from qosora import __version__
from qosora.base.calibrate import calibration_rows, rows_digest, second_moments
from qosora.base.layout import PlainModel, natural_order
from qosora.base.reports import ConversionReport, LayerReport
from qosora.base.structure import decompose_structure
from qosora.base.task import with_task
from qosora.checkpoints import (
    CONFIG_NAME,
    TEXTS,
    Processes,
    Progress,
    SourceCheckpoint,
    StoredSpec,
    Unit,
    copy_files,
    expanded,
    load_config,
    manifest_key,
    open_source,
    refuse_input_as_output,
    require_finite,
    stream,
)
from qosora.compat.transformers import forget_tie, unexpected_tensors
from qosora.config import QosoraConfig
from qosora.decompose import factorize_with_report
from qosora.errors import CheckpointError, ConfigError
from qosora.formats import BASE
from qosora.layers import EightBitMatrix, QosoraLinear, layers_on_disk
from qosora.places import published_name

__all__ = ["own_device", "quantize"]

logger = logging.getLogger("qosora")

#: What quantizing a value costs, in the unit of what a singular triplet costs it; for dividing the work.
_QUANTIZATION_COST = 64


def quantize(
    source: str | Path,
    output: str | Path,
    config: QosoraConfig | None = None,
    *,
    task: str | None = None,
    labels: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_shard_bytes: int = 1_000_000_000,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
    """Decompose a checkpoint into a qosora base, or go on where an earlier call has ended.

    Until it is complete the base is in `OUTPUT.partial`. Under `accelerate launch` or torchrun the processes divide the
    tensors; the bytes of the base are the same for any number of processes and threads.

    Args:
        source: Folder, hub id or GGUF file of a model.
        output: Folder to make.
        config: Ranks and storage; `QosoraConfig()` by default.
        task: One of `qosora.checkpoints.TASKS`, for a model with a new head, drawn at random; by default it stays.
        labels: Of a classifier.
        dtype: Of the tensors that are not decomposed; by default the checkpoint's, for GGUF bfloat16. The weights that
            are decomposed are read at the checkpoint's own precision.
        device: Where to decompose; by default the process's GPU, or the CPU without one.
        max_shard_bytes: Size of the output's shards.
        overwrite: Whether `output` may be replaced; it stays until the new base is complete.
        restart: Whether to throw away what an unfinished call has left.
        trust_remote_code: Whether to run model code that the checkpoint brings.
        progress: Called at the start and after each tensor; with several processes in the first only. The reports of
            decomposed layers are `LayerReport`s as plain data, those of other tensors empty.

    Raises:
        CheckpointError: If the source cannot be read, is quantized already, or does not fit its model class, or the
            output cannot be written.
        ConfigError: If there is no such device, the config does not fit the model, or an unfinished call had other
            arguments.
    """
    start = time.perf_counter()
    config = copy.copy(config or QosoraConfig())  # what cannot be decomposed is added to it
    with ExitStack() as stack:
        processes = stack.enter_context(Processes())
        checkpoint = stack.enter_context(open_source(source, trust_remote_code=trust_remote_code))
        origin = checkpoint.origin
        task = task or (TEXTS if labels else None)
        if task is not None:
            checkpoint = stack.enter_context(with_task(checkpoint, str(source), task, labels, seed=config.seed))
        device = _usable(device or own_device(processes))
        local = Path(expanded(source))
        refuse_input_as_output(output, local if local.exists() else None, origin)
        conversion = _Conversion(str(source), checkpoint, config, dtype, trust_remote_code)
        conversion.match()
        units = [conversion.unit(disk, name, device) for disk, name in conversion.tensors.items()]
        made_with = _made_with(config, device) | ({"task": task, "labels": [*labels]} if task is not None else {})
        calibration: dict[str, Any] = {}
        before = None
        if config.scale == "calibrated":
            rows = calibration_rows(config, checkpoint.origin, trust_remote_code)
            calibration = {"calibration": {"tokens": rows.numel(), "sha256": rows_digest(rows)}}

            def before(file: Path) -> None:
                conversion.moments = second_moments(
                    checkpoint, rows, conversion.linears, device=device, file=file, trust_remote_code=trust_remote_code
                )

        def finish(folder: Path, reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
            copy_files(folder, checkpoint.origin, with_code=trust_remote_code)
            conversion.config.save_pretrained(folder)
            # No times, so that a base is the same however it was made.
            layers = [{k: v for k, v in report.items() if k != "seconds"} for report in reports.values() if report]
            made = {"source_files": _sizes(units), "made_with": made_with, "layers": layers} | calibration
            return {"source": published_name(source, output, manifest_key(made)), **made}

        reports = stream(
            output,
            units,
            finish,
            job={**made_with, **calibration, "dtype": str(conversion.dtype)},
            before=before,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            restart=restart,
            processes=processes,
            progress=progress,
        )
    layers = [LayerReport(**{**report, "shape": tuple(report["shape"])}) for report in reports.values() if report]
    base_bytes = sum(spec.nbytes for unit in units for spec in unit.specs.values())
    return ConversionReport(str(source), layers, base_bytes, time.perf_counter() - start)


def own_device(processes: Processes) -> str:
    """Return the GPU of a process, which with fewer GPUs than processes is another's, too; the CPU without one."""
    return f"cuda:{processes.local_index % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such kind, no such index, or a torch without CUDA
        raise ConfigError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _fetched(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of a mapped file on a device, or with its pages in memory: here, not where it is first used."""
    if device.type == "cpu":
        tensor.flatten().view(torch.uint8)[::4096].sum()
    return tensor.to(device)


def _made_with(config: QosoraConfig, device: torch.device) -> dict[str, Any]:
    """Return what determines the base besides the source: options, arithmetic, versions."""
    options = {key: value for key, value in config.to_dict().items() if key != "quant_method"}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**options, "device": hardware, "qosora": __version__, "torch": torch.__version__}


def _sizes(units: Iterable[Unit]) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted({file for unit in units for file in unit.files})}


class _Conversion:
    """What becomes of each tensor: the model class on the meta device, with its linear layers replaced.

    Attributes:
        config: Of the base that is made.
        layers: The decomposed layers, by the name of their weight in the model.
        linears: Names of those of them that are no embeddings or output layer.
        moments: With a calibrated scale, of their inputs, by their names.
        tensors: What to read, in order: name on disk -> name in the model. Names on disk stay.
    """

    def __init__(
        self,
        source: str,
        checkpoint: SourceCheckpoint,
        storage: QosoraConfig,
        dtype: torch.dtype | None,
        trust_remote_code: bool,
    ) -> None:
        self.source, self.storage = source, storage
        self.plain = PlainModel(checkpoint.origin, trust_remote_code, stacks=BASE)
        self.reader = self.plain.apart(checkpoint.reader)
        self.config: PreTrainedConfig = load_config(checkpoint.origin, trust_remote_code=trust_remote_code)
        self.dtype = self.config.dtype = dtype or self.config.dtype or self._stored_dtype()
        self.config.architectures = [self.plain.class_name]
        self.config.quantization_config = storage
        self.layers: dict[str, QosoraLinear | EightBitMatrix] = {}
        self.linears: list[str] = []
        self.tensors: dict[str, str] = {}
        self.moments: dict[str, torch.Tensor] = {}

    def _stored_dtype(self) -> torch.dtype:
        """Return the dtype of the first floating-point tensor: what transformers takes where config.json has none."""
        dtypes = map(self.reader.dtype, self.reader.names())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def match(self) -> None:
        """Find the model's tensors in the checkpoint, and which of them are decomposed.

        Raises:
            CheckpointError: If one is missing, or has another shape.
            ConfigError: If the config does not fit the model.
        """
        located: set[str] = set()
        homeless = []
        for disk in natural_order(self.reader.names()):
            name, parts = self.plain.locate(disk)
            if not set(parts) & self.plain.shapes.keys():
                homeless.append(disk)
                continue
            located.update(parts)
            self.tensors[disk] = name
            if parts == [name]:
                self._check_shape(name, self.reader.shape(disk))
        if unexpected := natural_order(unexpected_tensors(self.plain.model, homeless)):
            raise CheckpointError(
                f"{self.source}: {len(unexpected)} tensors have no place in {self.plain.class_name}, among them "
                f"{unexpected[0]!r}; the model would not be what was trained. Let architectures in {CONFIG_NAME} name "
                "the class that it was made for, or take them out"
            )
        if missing := self.plain.missing(located):
            raise CheckpointError(
                f"{self.source}: {len(missing)} tensors that {self.plain.class_name} needs are not in the "
                f"checkpoint, among them {missing[0]!r}; get the whole checkpoint"
            )
        for disk, name in list(self.tensors.items()):
            if (partner := self.plain.tied.get(name)) in located:
                if self._is_copy(disk, partner):
                    del self.tensors[disk]
                else:  # transformers does not tie what differs, whatever the config says
                    logger.warning(
                        "%s: %s is not the copy of %s that config.json makes it: kept", self.source, name, partner
                    )
                    self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
                    forget_tie(self.plain.model, name)
        self.linears = decompose_structure(self.plain.model, self.storage, stacks=True)
        self.layers = {f"{name}.weight": module for name, module in layers_on_disk(self.plain.model).items()}

    def _is_copy(self, disk: str, partner: str) -> bool:
        """Say whether a tensor on disk equals the one that the model ties it to."""
        other = next((d for d, name in self.tensors.items() if name == partner), None)
        return other is None or torch.equal(self.reader.tensor(disk), self.reader.tensor(other))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = self.plain.shapes[name]
        if shape != expected:
            raise CheckpointError(
                f"{self.source}: {name} has shape {shape}, but config.json makes it {expected}; "
                "config and weights belong to different models"
            )

    def unit(self, disk: str, name: str, device: torch.device) -> Unit:
        """Return how a tensor of the checkpoint becomes tensors of the base."""
        module = self.layers.get(name)
        if module is None:
            return self._copied(disk, name)
        reader, prefix = self.reader, disk.removesuffix("weight")
        specs = {prefix + key: StoredSpec.of(p) for key, p in module.named_parameters() if key != "bias"}
        cost = module.out_features * module.in_features
        if isinstance(module, QosoraLinear):
            cost *= module.rank + _QUANTIZATION_COST

        def make(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            if isinstance(module, EightBitMatrix):
                state, report = module.state_of(weight, name), None
            else:
                state, report = self._decomposed(name, module, weight)
            return {prefix + key: tensor.cpu() for key, tensor in state.items()}, asdict(report) if report else {}

        return Unit(disk, specs, cost, [reader.file(disk)], lambda: _fetched(reader.tensor(disk), device), make)

    def _decomposed(
        self, name: str, module: QosoraLinear, weight: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], LayerReport]:
        """Return a layer's parameters by name, and its report."""
        start = time.perf_counter()
        oriented = weight.T if module.fan_in_fan_out else weight
        options: dict[str, Any] = {"name": name, "moments": self.moments.get(name.removesuffix(".weight"))}
        options |= self.storage.factorize_options() | module.factorize_options
        factors, error = factorize_with_report(oriented, module.rank, **options)
        state = {key: tensor.cpu() for key, tensor in module.state_of(factors).items()}  # a GPU has finished then
        shape, seconds = (module.out_features, module.in_features), time.perf_counter() - start
        return state, LayerReport(name.removesuffix(".weight"), shape, module.rank, **asdict(error), seconds=seconds)

    def _copied(self, disk: str, name: str) -> Unit:
        reader = self.reader
        dtype, shape = reader.dtype(disk), reader.shape(disk)
        spec = StoredSpec(self.dtype_of(name) if dtype.is_floating_point else dtype, shape)

        def make(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            why = "the checkpoint is damaged, or was saved from a diverged run; get another copy of it"
            return {disk: require_finite(disk, tensor, why)}, {}

        cpu = torch.device("cpu")
        files, cost = [reader.file(disk)], math.prod(shape)
        return Unit(disk, {disk: spec}, cost, files, lambda: _fetched(reader.tensor(disk), cpu), make)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that the model holds a tensor in."""
        return torch.float32 if self.plain.keeps_float32(name, self.dtype) else self.dtype

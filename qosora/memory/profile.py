"""`profile`: run real training steps, measure their memory, and set it beside what `plan` predicts.

Some steps run as they are and are timed; a last one runs under the tracer, which knows every live tensor's category. On
CUDA the allocator's own counters are read at each change of phase, on a CPU the process's resident set.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from qosora.base import load_base, load_tokenizer
from qosora.checkpoints import quantization_in, task_of
from qosora.compat.torch import own_buffers, own_parameters
from qosora.compat.trl import get_act_offloading_ctx_manager
from qosora.config import OsoraConfig, QosoraConfig
from qosora.data import Columns, Records, batches_by_length, embedding_rows, load_records, padded_batch, tokenize
from qosora.dtypes import dtype_named
from qosora.errors import ConfigError, DataError, QosoraError
from qosora.inference import seer_of
from qosora.layers import decoder_layers
from qosora.memory.cards import the_card
from qosora.memory.meta_kernels import CPU_WORKSPACES, CUDA_WORKSPACES
from qosora.memory.options import Batch, StepOptions
from qosora.memory.plan import Usage, shape_problems, storage_of, usage_of
from qosora.memory.predict import (
    TracedModel,
    meta_model,
    prediction,
    quantize_linears,
    stacked_experts,
)
from qosora.memory.shapes import model_config
from qosora.memory.step import prepare_model, register_model, register_optimizer, training_step
from qosora.memory.tracer import Event, Tracer
from qosora.training import choose_precision, create_optimizer, with_head

logger = logging.getLogger("qosora")

__all__ = ["Measurement", "fill_at_random", "measure", "offloading", "profile", "random_model"]


@dataclass(frozen=True)
class Measurement:
    """What `profile` found.

    Attributes:
        model: As given.
        batch: Its shape.
        options: Of the step.
        device: Name of the GPU, or "cpu".
        live: Live tensor bytes at the peak of the traced step, without what operations allocate inside.
        planned: The same as `plan` predicts it for this device; None if it was not asked for.
        allocated_bytes: By phase, the most that PyTorch's CUDA allocator had handed out; empty on a CPU.
        reserved_bytes: The most that it had reserved; 0 on a CPU.
        device_used_bytes: In use on the GPU after the steps, by all processes; 0 on a CPU.
        rss_bytes: By phase, the process's resident memory at its end.
        step_seconds: Median of the timed steps.
        tokens_per_second: Of these steps.
        events: Allocations of the traced step, for pictures.
    """

    model: str
    batch: Batch
    options: StepOptions
    device: str
    live: Usage
    planned: Usage | None
    allocated_bytes: dict[str, int]
    reserved_bytes: int
    device_used_bytes: int
    rss_bytes: dict[str, int]
    step_seconds: float
    tokens_per_second: float
    events: list[Event] = field(repr=False)

    @property
    def measured_bytes(self) -> int:
        """The peak: CUDA's own count, or live tensor bytes on a CPU."""
        return max(self.allocated_bytes.values(), default=self.live.allocated_bytes)

    @property
    def difference(self) -> float | None:
        """Planned over measured, less one."""
        return None if self.planned is None else self.planned.allocated_bytes / self.measured_bytes - 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        found = asdict(replace(self, events=[]))
        del found["events"]
        return {**found, "measured_bytes": self.measured_bytes, "difference": self.difference}


def profile(
    model: str | Path | PreTrainedModel,
    *,
    batch_size: int = 4,
    seq_len: int = 1024,
    rank: int | None = None,
    embeddings: str | None = None,
    steps: int = 3,
    data: str | None = None,
    columns: Columns | None = None,
    padding: bool | None = None,
    packing: bool = False,
    compare: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> Measurement:
    """Run training steps and measure their memory.

    Args:
        model: A qosora base (folder, hub id or loaded model), or a shape for random weights: a name in
            `qosora.memory.shapes.SHAPES`, or the folder or file of a config.
        batch_size: Examples on the device at once.
        seq_len: Tokens of each random example; examples of `data` are cut to it.
        rank: Singular triplets per layer of random weights; 128 by default.
        embeddings: How those store embeddings and output layer, as `QosoraConfig` has it.
        steps: Steps to time.
        data: Training data as for `qosora train`, whose longest examples make the batch; random tokens by default.
        columns: Of `data`.
        padding: Whether random examples differ in length; by default where there are several.
        packing: Whether several are packed into each sequence.
        compare: Whether to plan the same step. Of mixtures of experts, the plan is an upper bound, and there is none
            where experts are not linear layers.
        trust_remote_code: Whether to run model code that the checkpoint brings.
        **options: Fields of `StepOptions` but `device`, which is the GPU where there is one, and `method`. The default
            precision is that of `qosora train` on the device.

    Raises:
        CheckpointError: There is no such model.
        ConfigError: Options that cannot work.
        DataError: Data that cannot be used.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "precision" not in options:
        options["precision"] = choose_precision("auto")
    step = StepOptions(**options, device=device)
    problems = step.problems() + ["steps must be at least 1"] * (steps < 1)
    if packing and padding:
        problems.append("packing leaves nothing to pad: leave out one of the two")
    if problems:
        raise ConfigError(problems)
    loaded, storage = _load(model, step, {"rank": rank, "embeddings": embeddings}, trust_remote_code)
    batch = Batch(batch_size, seq_len, not packing and (batch_size > 1 if padding is None else padding), packing)
    task = task_of(loaded.config)
    eos = loaded.config.eos_token_id if task is not None and loaded.config.is_encoder_decoder else None
    inputs = batch.tensors(loaded.config.get_text_config().vocab_size, "cpu", task, eos)
    if data is not None and task is not None:
        raise ConfigError("a classifier's step is measured on random tokens: leave out data")
    records = None if data is None else load_records(data, columns=columns or Columns())
    if records is not None:
        batch, inputs = _longest(records, loaded, str(model), batch)
    if problems := shape_problems(loaded.config, batch.size, batch.length):
        raise ConfigError(problems)
    planned = None
    if compare and not stacked_experts(loaded):
        try:
            seen = inputs if records is not None and records.seen else None
            planned = usage_of(TracedModel(loaded.config, storage, step).predict(batch, seen), the_card(), device)
        except QosoraError as error:
            logger.warning("no plan to compare with: %s", error)
    measured = _measure(loaded, inputs, step, steps)
    return Measurement(
        model=loaded.config.name_or_path if isinstance(model, PreTrainedModel) else str(model),
        batch=batch,
        options=step,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        planned=planned,
        tokens_per_second=batch.tokens / measured["step_seconds"],
        **measured,
    )


def _load(
    model: str | Path | PreTrainedModel, step: StepOptions, asked: dict[str, Any], trust_remote_code: bool
) -> tuple[PreTrainedModel, QosoraConfig]:
    """Return a base, or random weights of a shape, and how it is decomposed."""
    if isinstance(model, PreTrainedModel):
        return model, storage_of(model.config, **asked)
    config = model_config(model, trust_remote_code=trust_remote_code)
    storage = storage_of(config, **asked)
    if quantization_in(config) is None:
        return random_model(config, storage, step), storage
    loaded = load_base(
        model,
        config=config,
        dtype=dtype_named(step.precision),
        attn_implementation=step.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    return loaded, storage


def random_model(config: PreTrainedConfig, storage: QosoraConfig, step: StepOptions) -> PreTrainedModel:
    """Return a model with random numbers for weights, for its memory and speed alone."""
    model: PreTrainedModel = meta_model(config, step)
    quantize_linears(model, storage, step)
    fill_at_random(model, step.device)
    return model.requires_grad_(False)


@torch.no_grad()
def fill_at_random(model: nn.Module, device: str) -> None:
    """Put random numbers on a device in place of all tensors on the meta device; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (own_parameters(module), own_buffers(module)):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    values = torch.empty_like(tensor, device=device)
                    if values.is_floating_point():
                        values.normal_(0, 0.01)
                    elif values.dtype == torch.uint8:  # packed
                        values.random_(0, 255)
                    else:  # indices
                        values.zero_()
                    made[id(tensor)] = nn.Parameter(values, False) if isinstance(tensor, nn.Parameter) else values
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _longest(
    records: Records, loaded: PreTrainedModel, model: str, like: Batch
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Return the batch of a data set's longest examples, which decide about the peak."""
    collate: Callable[[Any], dict[str, torch.Tensor]]
    if records.seen:
        seer = seer_of(model, embedding_rows(loaded), dtype=loaded.dtype)
        found, collate = seer.tokenize(records, max_length=like.length), seer.batch
    else:
        found, collate = tokenize(records, load_tokenizer(model), max_length=like.length), padded_batch
    examples = batches_by_length(found.examples, like.size)[0]
    if len(examples) < like.size or like.packing:
        raise DataError(
            f"{records.name}: packing cannot be measured on data; leave out one of the two"
            if like.packing
            else f"{records.name} has {len(examples)} examples, fewer than the batch size {like.size}"
        )
    shortest, longest = len(examples[-1].input_ids), len(examples[0].input_ids)
    return Batch(like.size, longest, padding=shortest < longest), collate(examples)


def _measure(base: PreTrainedModel, inputs: dict[str, torch.Tensor], step: StepOptions, steps: int) -> dict[str, Any]:
    model = get_peft_model(base, with_head(OsoraConfig(vectors=step.vectors, update_rank=step.update_rank), base))
    prepare_model(
        model,
        gradient_checkpointing=step.gradient_checkpointing,
        fused_head=step.loss == "chunked",
        tiling=step.tiling,
    )
    optimizer = create_optimizer(model, lr=1e-6, optimizer=step.optimizer)
    return measure(model, inputs, optimizer, step, steps)


def measure(
    model: Any, inputs: dict[str, torch.Tensor], optimizer: Any, step: StepOptions, steps: int
) -> dict[str, Any]:
    """Time some steps of any PEFT model, then trace one.

    Args:
        model: That `prepare_model` has prepared, on the device of `step`.
        inputs: A batch, on any device.
        optimizer: Of the model.
        step: Of which the device, the loss and offloading count here.
        steps: To time; with none, the time is that of the first step.

    Returns:
        The fields of `Measurement` that are measured.
    """
    saving = offloading(model) if step.activation_offloading else nullcontext
    inputs = {name: tensor.to(step.device) for name, tensor in inputs.items()}

    def run(tracer: Tracer | None = None) -> None:
        training_step(model, inputs, optimizer, tracer, loss=step.loss, saving=saving)

    seconds = []
    for _ in range(steps + 1):  # the first warms up
        start = time.perf_counter()
        run()
        if step.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    events: list[Event] = []
    workspaces = CUDA_WORKSPACES if step.device == "cuda" else CPU_WORKSPACES
    tracer = Tracer(workspaces=workspaces, log=events, device=step.device)
    counters = _Counters(step.device == "cuda")
    backbone, layers = decoder_layers(model.get_base_model())
    with tracer, tracer.following(model, backbone, layers):
        register_optimizer(tracer, optimizer)  # first: parameters are windows of its buffers
        register_model(tracer, model)
        tracer.register(inputs.values(), "batch")
        tracer.forget_sites()
        tracer.on_phase = counters.begin
        run(tracer)
        counters.begin("")
    live = usage_of(prediction(tracer.sites, 0), the_card(), "cpu")
    return {
        "live": live,
        "events": events,
        "step_seconds": statistics.median(seconds[1:] or seconds),
        **counters.found(),
    }


def offloading(model: Any) -> Callable[[], Any]:
    """Return what makes TRL's context of activation offloading, for forward and backward; needs a GPU."""
    context = get_act_offloading_ctx_manager(model=model)
    return lambda: context


class _Counters:
    """Reads what the system counts, at each change of phase."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.phase = cuda, ""
        self.allocated: dict[str, int] = {}
        self.rss: dict[str, int] = {}
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def begin(self, phase: str) -> None:
        """End the phase that was, and begin another."""
        if self.phase:
            self.rss[self.phase] = int(psutil.Process().memory_info().rss)
            if self.cuda:
                self.allocated[self.phase] = int(torch.cuda.max_memory_allocated())
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def found(self) -> dict[str, Any]:
        """Return the fields of `Measurement`."""
        used = 0
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            used = total - free
        return {
            "allocated_bytes": self.allocated,
            "reserved_bytes": int(torch.cuda.memory_reserved()) if self.cuda else 0,
            "device_used_bytes": used,
            "rss_bytes": self.rss,
        }

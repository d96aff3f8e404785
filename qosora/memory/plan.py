"""`plan`: will it fit, at which batch and length, and where do the bytes go? From the model's class, without weights.

The step is traced on the meta device (`predict`), and what a GPU needs beside live tensors is added (`cards`). Batch
sizes and lengths that were not traced are interpolated. At any place of a step, what is live is a sum of tensors whose
sizes are constant, or go with the tokens N = B·T, with the rows of the loss's tile, min(N, 4096), or, for masks and
eager attention's scores, with B·T²; so three or four traces give all others, but for the cosines and sines of T
positions, under 0.1 %. Where MLPs compute in tiles, that holds for batches of one tile, and for those of several with
the tokens of a tile besides. What is reported as the largest batch and the longest sequence was traced itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedConfig

from qosora.checkpoints import base_storage, sees
from qosora.config import QosoraConfig
from qosora.data import most_positions
from qosora.decompose import EMBEDDINGS
from qosora.errors import ConfigError
from qosora.memory.cards import (
    ASSUMPTIONS,
    LINK,
    OF_EXPERTS,
    OF_FP16,
    OF_HOST,
    OF_IMAGES,
    OF_TEXT,
    OVERHEAD,
    Card,
    the_card,
)
from qosora.memory.options import Batch, Prediction, StepOptions, has_experts
from qosora.memory.shapes import model_config
from qosora.memory.tracer import CATEGORIES, PHASES, Event, Site
from qosora.memory.traces import Traces

if TYPE_CHECKING:
    import torch

__all__ = [
    "OUTSIDE",
    "Advice",
    "Cell",
    "Plan",
    "Streaming",
    "Usage",
    "events",
    "plan",
    "shape_problems",
    "storage_of",
    "usage_of",
]

GRID_BATCHES = (1, 2, 4, 8, 16)
GRID_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
#: Memory that is there before a step and after it.
LASTING = (
    "base residual", "factors", "layers in use", "adapter", "embeddings and head", "norms, biases, buffers",
    "optimizer state", "optimizer state, paged",
)  # fmt: skip
#: Memory of a process on a GPU that PyTorch does not count as allocated.
OUTSIDE = ("optimizer state, paged", "allocator overhead", "CUDA context")


@dataclass(frozen=True)
class Usage:
    """The memory of a step at its peak.

    Attributes:
        rows: Bytes by what they are for; they add up to `total_bytes`.
        allocated_bytes: What `torch.cuda.max_memory_allocated` counts; on a CPU live tensor bytes.
        total_bytes: With paged states, the allocator's overhead and the context.
        phase: Of the step, at the peak.
        module: That runs at the peak; `layers.*` is the decoder layer `layer`.
        layer: Counted from 0; None outside layers.
        op: The operation of the peak.
        phases: Bytes at the peak of each phase, as `allocated_bytes`.
    """

    rows: dict[str, int]
    allocated_bytes: int
    total_bytes: int
    phase: str
    module: str
    layer: int | None
    op: str
    phases: dict[str, int]

    @property
    def lasting_bytes(self) -> int:
        """Bytes of the model and of what is trained, without any step."""
        return sum(self.rows.get(name, 0) for name in LASTING)

    def verdict(self, memory_bytes: int) -> str:
        """Return "fits", "tight" where it fits but for the allocator's overhead, or "no"."""
        return _verdict(self.total_bytes, self.rows.get("allocator overhead", 0), memory_bytes)


@dataclass(frozen=True)
class Cell:
    """What a batch size and length take, and whether that fits the card, if one is known."""

    batch_size: int
    seq_len: int
    total_bytes: int
    verdict: str | None


@dataclass(frozen=True)
class Advice:
    """A change that lowers the peak, what it brings and whether that is enough."""

    change: str
    saved_bytes: int
    total_bytes: int
    fits: bool


@dataclass(frozen=True)
class Streaming:
    """A base that comes from host memory, layer by layer.

    Attributes:
        host_bytes: Of the base, in each process.
        link: 10^9 bytes a second from host memory to the GPU.
        tflops: 10^12 operations a second of the GPU; None if unknown.
        free_from: Tokens of a batch from which a layer computes for longer than the next takes to come; None if
            unknown.
    """

    host_bytes: int
    link: float
    tflops: float | None
    free_from: int | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        model: As given.
        rank: Of the decomposition.
        embeddings: How embeddings and output layer are stored; None for 16 bits.
        trained_parameters: In the vectors.
        batch: Its shape.
        options: Of the step.
        card: What was planned for.
        usage: At the peak.
        qlora: The same for PEFT QLoRA, or None.
        largest_batch: That fits at this length; 0 for none, None without a card.
        longest_sequence: That fits at this batch size; 0 for none, None without a card.
        grid: Other batch sizes and lengths, interpolated.
        advice: What to change where it does not fit.
        assumptions: What the figures rest on.
        streaming: Of a base in host memory, or None.
    """

    model: str
    rank: int
    embeddings: str | None
    trained_parameters: int
    batch: Batch
    options: StepOptions
    card: Card
    usage: Usage
    qlora: Usage | None
    largest_batch: int | None
    longest_sequence: int | None
    grid: list[Cell]
    advice: list[Advice]
    assumptions: tuple[str, ...]
    streaming: Streaming | None

    @property
    def verdict(self) -> str | None:
        """Whether it fits: "fits", "tight", "no", or None without a card."""
        return None if self.card.memory_bytes is None else self.usage.verdict(self.card.memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "verdict": self.verdict}


def plan(
    model: str | Path | PreTrainedConfig,
    *,
    batch_size: int = 4,
    seq_len: int = 1024,
    rank: int | None = None,
    embeddings: str | None = None,
    storage: QosoraConfig | None = None,
    padding: bool | None = None,
    packing: bool = False,
    written: int = 0,
    rounds: int = 1,
    gpu: str | None = None,
    gpu_memory: str | int | None = None,
    link: float | None = None,
    tflops: float | None = None,
    compare: bool = True,
    grid: bool = True,
    inputs: Mapping[str, torch.Tensor] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Plan:
    """Predict the memory of fine-tuning a model with qosora.

    Args:
        model: A name in `qosora.memory.shapes.SHAPES`, a folder or file with a model's config, a hub id, or a config.
        batch_size: Examples on the device at once.
        seq_len: Tokens of each.
        rank: Singular triplets per layer; a base's own, else 128, by default.
        embeddings: How embeddings and output layer are stored, as `QosoraConfig` has it; a base's own by default.
        storage: All of how the model is decomposed, in place of both.
        padding: Whether examples differ in length; by default where there are several.
        packing: Whether several examples are packed into each sequence.
        written: Of `seq_len`, the tokens that the model writes itself before the step, as with `--method grpo`.
        rounds: Batches whose answers are written at once.
        gpu: Name of a card, such as "RTX 4090".
        gpu_memory: Size of one, such as "24GiB", or bytes.
        link: 10^9 bytes a second from host memory to the GPU; 25 by default.
        tflops: 10^12 operations a second of the GPU; half of what its maker says by default.
        compare: Whether to plan PEFT QLoRA, too; not for mixtures of experts.
        grid: Whether to plan other batch sizes and lengths, too.
        inputs: The batch itself, of a model that sees, in place of its shape, padding and grid.
        trust_remote_code: Whether to run model code that the folder brings.
        **options: Fields of `StepOptions`.

    Raises:
        CheckpointError: There is no such model.
        ConfigError: Options that cannot work, or a card that is too small for the weights alone.
        QosoraError: The model cannot be traced.

    Example:
        >>> plan("llama-3.2-1b", seq_len=512, grid=False, compare=False).usage.phase
        'backward'
    """
    config = model if isinstance(model, PreTrainedConfig) else model_config(model, trust_remote_code=trust_remote_code)
    storage = storage or storage_of(config, rank, embeddings)
    step = StepOptions(**options)
    if inputs is not None:
        batch_size, seq_len = inputs["input_ids"].shape
        padding, grid = not bool(inputs["attention_mask"].all()), False
    problems = shape_problems(config, batch_size, seq_len) + step.problems()
    if written and not (1 <= written < seq_len and rounds >= 1 and not packing and not grid):
        problems.append(
            "written must be at least 1 and less than seq_len, rounds at least 1, packing and grid False; got "
            f"{written} of {seq_len}, {rounds}, {packing} and {grid}"
        )
    if step.device == "cpu" and (gpu, gpu_memory) != (None, None):
        problems.append("gpu and gpu_memory are those of a card, and device is cpu: leave them out, or plan for cuda")
    if packing and padding:
        problems.append("packing leaves nothing to pad: leave out one of the two")
    if step.base_on != "host" and (link, tflops) != (None, None):
        problems.append("link and tflops are about a base in host memory: give base_on host, too")
    problems += [
        f"{name} must be above 0, got {value}"
        for name, value in (("link", link), ("tflops", tflops))
        if value is not None and value <= 0
    ]
    if problems:
        raise ConfigError(problems)
    card = the_card(gpu, gpu_memory) if step.device == "cuda" else Card("cpu", None)
    data = _Data(packing, padding, written, rounds, inputs)
    planner = _Planner(config, storage, step, card, data)
    batch = data.batch(batch_size, seq_len)
    usage = planner.usage(batch)
    memory = card.memory_bytes
    if memory is not None and usage.lasting_bytes + card.context_bytes > memory:
        raise ConfigError(
            f"the weights alone take {usage.lasting_bytes / 2**30:.2f} GiB and the CUDA context "
            f"{card.context_bytes / 2**30:.2f} GiB, more than the {memory / 2**30:.2f} GiB of the card: "
            + "keep the base in host memory, with base_on host, or " * (step.away != "host")
            + "take a smaller model"
        )
    mixture = has_experts(config)
    compare = compare and not mixture
    rival = replace(step, method="qlora")
    qlora = _Planner(config, storage, rival, card, data) if compare else None
    return Plan(
        model=str(model) if isinstance(model, (str, Path)) else config.name_or_path or config.model_type,
        rank=storage.rank,
        embeddings=storage.embeddings,
        trained_parameters=planner.traced.facts.trained_parameters,
        batch=batch,
        options=step,
        card=card,
        usage=usage,
        qlora=qlora.usage(batch) if qlora else None,
        largest_batch=planner.largest_batch(seq_len) if grid and memory is not None else None,
        longest_sequence=planner.longest_sequence(batch_size) if grid and memory is not None else None,
        grid=planner.grid() if grid else [],
        advice=[] if memory is None or usage.verdict(memory) == "fits" else planner.advice(batch, usage),
        assumptions=ASSUMPTIONS * (step.device == "cuda")
        + OF_HOST * (step.away is not None)
        + OF_FP16 * (step.precision == "fp16")
        + OF_EXPERTS * mixture
        + OF_TEXT * (inputs is None and sees(config))
        + OF_IMAGES * (inputs is not None and step.device == "cuda"),
        streaming=planner.streaming(link or LINK, tflops or card.tflops) if step.away == "host" else None,
    )


def events(
    model: str | Path | PreTrainedConfig,
    found: Plan,
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    trust_remote_code: bool = False,
) -> list[Event]:
    """Return the allocations of the step that was planned, all layers traced, for pictures."""
    config = model if isinstance(model, PreTrainedConfig) else model_config(model, trust_remote_code=trust_remote_code)
    from qosora.memory.predict import TracedModel

    traced = TracedModel(config, storage_of(config, found.rank, found.embeddings), found.options, full_depth=True)
    return traced.events(found.batch, inputs)


def storage_of(config: PreTrainedConfig, rank: int | None, embeddings: str | None = None) -> QosoraConfig:
    """Return how a base is decomposed, or how a model would be with these options."""
    asked: dict[str, Any] = {
        name: value for name, value in (("rank", rank), ("embeddings", embeddings)) if value is not None
    }
    stored = base_storage(config)
    if stored is None:
        return QosoraConfig(**asked)
    storage = QosoraConfig.from_dict(stored)
    for name, value in asked.items():
        if value != (own := getattr(storage, name)):
            raise ConfigError(f"the base is decomposed with {name} {own}, so {name} {value} cannot be planned for it")
    return storage


def shape_problems(config: PreTrainedConfig, batch_size: int, seq_len: int) -> list[str]:
    """Return a sentence for each thing that keeps a model from training on a batch of a shape."""
    problems = [
        f"{name} must be an integer of at least {least}, got {value!r}"
        for name, value, least in (("batch_size", batch_size, 1), ("seq_len", seq_len, 2))
        if not isinstance(value, int) or value < least
    ]
    positions = most_positions(config)
    if not problems and positions is not None and seq_len > positions:
        problems.append(f"seq_len {seq_len} is longer than the model's {positions} positions")
    return problems


@dataclass(frozen=True)
class _Data:
    """What all batches of a plan have alike; or the only one, as `inputs`."""

    packing: bool = False
    padding: bool | None = None
    written: int = 0
    rounds: int = 1
    inputs: Mapping[str, torch.Tensor] | None = None

    def batch(self, size: int, length: int) -> Batch:
        """Return a batch of a size and length."""
        padding = not self.packing and (size > 1 if self.padding is None else self.padding)
        return Batch(size, length, padding, self.packing, self.written, self.rounds)


class _Planner:
    """Traces and interpolates for one model, one way of training and one card."""

    def __init__(
        self, config: PreTrainedConfig, storage: QosoraConfig, step: StepOptions, card: Card, data: _Data
    ) -> None:
        self.config, self.storage, self.step, self.card, self.data = config, storage, step, card, data
        self.traced = Traces(config, storage, step)
        text = config.get_text_config()
        self.positions: int = most_positions(config) or 2**20
        self.window: int = getattr(text, "sliding_window", None) or 2**30
        self.tile = step.tiling.length if step.method == "qosora" else 0
        self._known: dict[Batch, Prediction] = {}
        self._families: dict[Any, dict[Site, _Family]] = {}

    def streaming(self, link: float, tflops: float | None) -> Streaming:
        """Return how the base comes, and from which batch on that takes no time."""
        traced = self.traced.facts
        free = None
        if tflops is not None and not has_experts(self.config):  # of which a layer's tokens use some
            for_a_token = 2 * traced.layer_products / (1e12 * tflops)
            free = math.ceil(traced.largest_layer / (1e9 * link) / for_a_token)
        return Streaming(traced.host_bytes, link, tflops, free)

    def usage(self, batch: Batch) -> Usage:
        """Trace a batch."""
        return usage_of(self._predict(batch), self.card, self.step.device)

    def _predict(self, batch: Batch) -> Prediction:
        if batch not in self._known:
            self._known[batch] = self.traced.predict(batch, self.data.inputs)
        return self._known[batch]

    def total(self, batch: Batch) -> int:
        """Return the total bytes of a batch, interpolated from a few others where these can be had."""
        slides, tiled = batch.columns >= self.window, bool(self.tile) and batch.tokens > self.tile
        regime = (batch.padding, batch.packing, slides, tiled)
        if regime not in self._families:
            self._families[regime] = self._families_of(batch, slides, tiled)
        if not self._families[regime]:
            return self.usage(batch).total_bytes
        live = max(family.at(batch) for family in self._families[regime].values())
        return sum(_outside(live, self.traced.facts.paged_bytes, self.card, self.step.device).values()) + live

    def _families_of(self, like: Batch, slides: bool, tiled: bool) -> dict[Site, _Family]:
        """Trace batches like one: of two lengths, on the same side of the sliding window, and in tiles or in one."""
        limit = self.positions if slides or self.window > self.positions else self.window - 1
        unit = min(max(self.window, 1024) if slides and not like.packing else 1024, limit // 2)
        size = max(1, 2048 // unit)
        chunks = True  # whether some of the batches have fewer tokens than a chunk of the loss, and some more
        if tiled:
            size = self.tile // unit + 1
        elif self.tile:
            unit = min(unit, self.tile // 8)
            size, chunks = max(1, self.tile // (8 * unit or 1)), self.tile > self.traced.facts.loss_chunk
            if unit < 2 or (slides and not like.packing and unit < self.window):
                return {}
        squares = like.padding or like.packing or slides or self.traced.facts.attention == "eager"
        shapes = [(size, unit), (4 * size, 2 * unit)] + [(size, 2 * unit)] * chunks + [(4 * size, unit)] * squares
        batches = [replace(like, size=size, length=length) for size, length in shapes]
        found = [self._predict(batch).sites for batch in batches]
        common = set.intersection(*(set(sites) for sites in found))
        tile = self.tile if tiled else 0
        return {
            site: _Family(batches, [s[site] for s in found], tile, self.traced.facts.loss_chunk, squares)
            for site in common
        }

    def verdict(self, total: int) -> str | None:
        """Return what a total means for the card."""
        memory = self.card.memory_bytes
        if memory is None:
            return None
        slack = total - self.card.context_bytes - self.traced.facts.paged_bytes
        return _verdict(total, slack - int(slack / (1 + OVERHEAD)), memory)

    def largest_batch(self, length: int) -> int:
        """Return the largest batch size that fits at a length, traced itself; 0 if none does."""
        return self._largest(lambda n: self.data.batch(n, length), 4096)

    def longest_sequence(self, size: int) -> int:
        """Return the longest sequence, in steps of 128, that fits at a batch size, traced itself; 0 if none does."""
        return 128 * self._largest(lambda n: self.data.batch(size, 128 * n), self.positions // 128)

    def _largest(self, make: Callable[[int], Batch], most: int) -> int:
        """Return the largest number whose batch fits, traced itself; 0 if none does."""
        memory = self.card.memory_bytes or 0
        fails, beyond = most + 1, 0
        while True:
            found, high = 0, fails
            while high - found > 1:
                middle = (found + high) // 2
                fits = self.total(make(middle)) + beyond <= memory
                found, high = (middle, high) if fits else (found, middle)
            if not found or (traced := self.usage(make(found)).total_bytes) <= memory:
                break
            # Interpolation is off by as much nearby.
            fails, beyond = found, traced - self.total(make(found))
        while beyond and found + 1 < fails and self.usage(make(found + 1)).total_bytes <= memory:
            found += 1
        return found

    def grid(self) -> list[Cell]:
        """Return what other batch sizes and lengths take."""
        cells = []
        for size in GRID_BATCHES:
            for length in GRID_LENGTHS:
                if length <= self.positions:
                    total = self.total(self.data.batch(size, length))
                    cells.append(Cell(size, length, total, self.verdict(total)))
        return cells

    def advice(self, batch: Batch, usage: Usage) -> list[Advice]:
        """Return changes that lower the peak, each by itself, the largest saving first."""
        memory = self.card.memory_bytes or 0
        found = []
        for change, step, storage, other in self._changes(batch):
            try:
                planner = self if step == self.step and storage is self.storage else self._other(step, storage)
            except ConfigError:  # as of embeddings that cannot be decomposed
                continue
            total = planner.usage(other).total_bytes
            if total < usage.total_bytes:
                found.append(Advice(change, usage.total_bytes - total, total, total <= memory))
        return sorted(found, key=lambda advice: -advice.saved_bytes)

    def _other(self, step: StepOptions, storage: QosoraConfig) -> _Planner:
        return _Planner(self.config, storage, step, self.card, self.data)

    def _changes(self, batch: Batch) -> Iterator[tuple[str, StepOptions, QosoraConfig, Batch]]:
        step, storage = self.step, self.storage
        for name, value, text in _CHEAPER:
            same = getattr(step, name) == value or (name, step.precision) == ("precision", "fp16")
            if not same and (name != "attn_implementation" or self.step.attn_implementation == "eager"):
                yield text, replace(step, **{name: value}), storage, batch  # type: ignore[arg-type]
        if batch.size > 1 and self.data.inputs is None:
            one = self.data.batch(1, batch.length)
            if batch.written:  # as many answers at once
                one = replace(one, rounds=batch.size * batch.rounds)
            yield "--batch-size 1, with --gradient-accumulation in training", step, storage, one
        if batch.written >= 32:
            half = batch.written // 2
            shorter = replace(batch, length=batch.length - half, written=batch.written - half)
            yield f"--max-completion-length {batch.written - half}", step, storage, shorter
        elif batch.length >= 256 and self.data.inputs is None:
            half = batch.length // 2
            yield f"--seq-len {half}", step, storage, self.data.batch(batch.size, half)
        if base_storage(self.config) is not None:
            return
        if storage.rank > 32:
            changed = copy.copy(storage)
            changed.rank = storage.rank // 2
            yield f"--rank {changed.rank}", step, changed, batch
        if storage.embeddings is None:
            changed = copy.copy(storage)
            changed.embeddings = EMBEDDINGS[-1]
            yield f"--embeddings {EMBEDDINGS[-1]}", step, changed, batch


_CHEAPER = (
    ("gradient_checkpointing", True, "--gradient-checkpointing"),
    ("chunked_loss", True, "--chunked-loss"),
    ("attn_implementation", "sdpa", "--attn-implementation sdpa"),
    ("precision", "bf16", "--precision bf16"),
    ("tile_length", 1024, "--tile-length 1024"),
    ("activation_offloading", True, "--activation-offloading"),
    ("optimizer", "paged_adamw_8bit", "--optimizer paged_adamw_8bit"),
    ("base_on", "host", "--base-on host"),
)


class _Family:
    """Live bytes at one place of a step, for batches that differ in size and length alone.

    Args:
        batches: Traced ones.
        totals: Their bytes.
        tile: The most tokens of a tile; 0 where nothing is computed in tiles.
        chunk: The most tokens of which the loss is computed at once.
        squares: Whether something goes with the square of the length.
    """

    def __init__(self, batches: Sequence[Batch], totals: Sequence[int], tile: int, chunk: int, squares: bool) -> None:
        self._tile, self._chunk, self._squares = tile, chunk, squares
        terms = np.array([self._terms(batch) for batch in batches])
        self._scale = terms.max(axis=0)
        # Least squares, as two terms may be the same for all batches like these, and which of them counts is no matter.
        self._coefficients = np.linalg.lstsq(terms / self._scale, np.array(totals, dtype=float), rcond=1e-9)[0]

    def at(self, batch: Batch) -> int:
        """Return the bytes for a batch."""
        return round(float((np.array(self._terms(batch)) / self._scale) @ self._coefficients))

    def _terms(self, batch: Batch) -> list[float]:
        terms = [1.0, batch.tokens, min(batch.tokens, self._chunk)]
        if self._tile:  # tiles are of equal length, in each row of the batch
            rows, count = batch.tokens // batch.columns, -(-batch.tokens // self._tile)
            terms.append(rows * -(-batch.columns // count))
        if self._squares:
            terms.append(batch.tokens * batch.columns)
        return terms


def _outside(live: int, paged: int, card: Card, device: str) -> dict[str, int]:
    """Return what comes to the live bytes of a step: rows and bytes."""
    if device == "cpu":
        return {}
    allocated = live + card.workspace_bytes
    return {
        "cuBLAS workspaces": card.workspace_bytes,
        "optimizer state, paged": paged,
        "allocator overhead": round(OVERHEAD * allocated),
        "CUDA context": card.context_bytes,
    }


def usage_of(found: Prediction, card: Card, device: str) -> Usage:
    """Return a prediction with what a device adds to it."""
    outside = _outside(found.peak_bytes, found.paged_bytes, card, device)
    workspaces = outside.get("cuBLAS workspaces", 0)
    rows = {name: found.live[name] for name in CATEGORIES if found.live.get(name)}
    rows |= {name: value for name, value in outside.items() if value}
    layer = None if found.site.layer < 0 else found.site.layer
    phases = {phase: found.phases[phase] + workspaces for phase in PHASES if phase in found.phases}
    return Usage(
        rows, found.peak_bytes + workspaces, found.peak_bytes + sum(outside.values()), found.site.phase,
        found.site.module, layer, found.op, phases,
    )  # fmt: skip


def _verdict(total: int, overhead: int, memory: int) -> str:
    """Return "fits", "tight" where it fits but for the allocator's overhead, or "no"."""
    return "fits" if total <= memory else "tight" if total - overhead <= memory else "no"

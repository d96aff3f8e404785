"""The plan of a training run, and the batch that fits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from qosora.checkpoints import sees, split_source
from qosora.errors import ConfigError, QosoraError
from qosora.memory.plan import Plan, plan
from qosora.memory.shapes import model_config
from qosora.training import AUTO, BATCH_SIZE, Preview, TrainConfig, preview_run, records_of

__all__ = ["fit_batch_size", "plan_run", "planned_peak"]

logger = logging.getLogger(__name__)


_COMPILED = (
    "compiled layers are planned as others: they keep no more for backward; what their kernels allocate while they run "
    "is not known"
)


def plan_run(config: TrainConfig, found: Preview, *, gpu: str | None = None, gpu_memory: str | None = None) -> Plan:
    """Predict the memory of a run's step, on its longest examples.

    Args:
        config: Of the run.
        found: What it trains on, as `preview_run` has it.
        gpu: Name of a card to plan for; that of this machine by default.
        gpu_memory: Size of one, such as "24GiB".

    Raises:
        CheckpointError: The model is no qosora base.
        ConfigError: A card that nobody knows, or that is too small for the weights alone.
    """
    inputs = None if found.largest is None else found.largest(config.batch_size)
    longest = found.longest + found.answer
    return _plan(config, found.source, longest, found.precision, gpu, gpu_memory, found.answer, inputs)


def planned_peak(config: TrainConfig, longest: int, precision: str) -> int | None:
    """Return the bytes of tensors that the plan has at the peak of a run's step on this machine; None if it has none.

    It has none of a run on images, of which it would have to read all.

    Args:
        config: Of the run.
        longest: Tokens of its longest sequence.
        precision: That it was run in.
    """
    try:
        source, _ = split_source(config.model)
        if sees(model_config(source, trust_remote_code=config.trust_remote_code)) and _has_images(config):
            return None
        return _plan(config, source, longest, precision, None, None).usage.allocated_bytes
    except (QosoraError, OSError):  # the base has moved, or its model cannot be traced
        return None


def _has_images(config: TrainConfig) -> bool:
    return records_of(config, held_out=False, limit=config.limit).seen


def _plan(
    config: TrainConfig,
    source: str,
    longest: int,
    precision: str,
    gpu: str | None,
    gpu_memory: str | None,
    written: int = 0,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    elsewhere = gpu is not None or gpu_memory is not None
    found = plan(
        source,
        batch_size=config.batch_size * (2 if config.method in ("dpo", "orpo", "reward") else 1),
        seq_len=config.max_length if config.packing else longest,
        packing=config.packing,
        written=written,
        rounds=config.gradient_accumulation if written else 1,
        vectors=config.vectors,
        update_rank=config.update_rank,
        gradient_checkpointing=config.gradient_checkpointing,
        orpo=config.method == "orpo",
        tile_length=config.tile_length,
        activation_offloading=config.activation_offloading,
        base_on=config.base_on,
        optimizer=config.optimizer,
        precision="bf16" if elsewhere and config.precision == "auto" else precision,  # that of the card
        gpu=gpu,
        gpu_memory=gpu_memory,
        device="cuda" if elsewhere or torch.cuda.is_available() else "cpu",
        compare=False,
        grid=False,
        inputs=inputs,
        trust_remote_code=config.trust_remote_code,
    )
    return replace(found, assumptions=(*found.assumptions, _COMPILED)) if config.compile else found


def fit_batch_size(config: TrainConfig, *, gpu: str | None = None, gpu_memory: str | None = None) -> TrainConfig:
    """Return a configuration whose batch is the largest that the plan fits into the card.

    A step has as many examples as it would have by default, 4 gradient_accumulation, on the device at once as far as
    they fit, and accumulated for the rest. On a CPU, where no plan says what fits, at most 4 are taken at once.

    Args:
        config: With batch_size "auto"; any other is returned as it is.
        gpu: Name of a card to plan for; that of this machine by default.
        gpu_memory: Size of one, such as "24GiB".

    Raises:
        ConfigError: If not even one example fits, or the configuration cannot work.
        CheckpointError: The model is no qosora base.
        DataError: Data that cannot be used.
    """
    if config.batch_size != AUTO:
        return config
    if gpu is None and gpu_memory is None and not torch.cuda.is_available():
        logger.info("batch_size %d, gradient_accumulation %d", BATCH_SIZE, config.gradient_accumulation)
        return replace(config, batch_size=BATCH_SIZE)
    in_all = BATCH_SIZE * config.gradient_accumulation
    found = preview_run(replace(config, batch_size=1, gradient_accumulation=in_all))
    for size in (n for n in range(in_all, 0, -1) if in_all % n == 0):
        settled = replace(config, batch_size=size, gradient_accumulation=in_all // size)
        planned = plan_run(settled, found, gpu=gpu, gpu_memory=gpu_memory)
        if planned.verdict == "fits" or (planned.verdict == "tight" and size == 1):
            logger.info("batch_size %d, gradient_accumulation %d", settled.batch_size, settled.gradient_accumulation)
            return settled
    helps = "; ".join(advice.change for advice in planned.advice) or "take a smaller model, or a larger card"
    raise ConfigError(f"not even one example of {found.longest} tokens fits into {planned.card.name}: {helps}")

"""A checkpoint as one of another task: its layers, and a new head, whose tensors are drawn at random.

A language model becomes a classifier of texts or of words, or a model of rewards, as with transformers'
`AutoModelForSequenceClassification.from_pretrained(..., num_labels=...)`. What only the head that it had is made of
goes, what only the new one needs is drawn; a tensor that both kinds of model need and that is not there is missing as
ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from qosora.base.layout import PlainModel
from qosora.base.load import load_tokenizer
from qosora.checkpoints import (
    REWARD,
    TASKS,
    TEXTS,
    SourceCheckpoint,
    TensorReader,
    class_for_task,
    copy_files,
    load_config,
)
from qosora.compat.transformers import initialized, unexpected_tensors
from qosora.errors import CheckpointError, ConfigError

__all__ = ["with_task"]

#: Where new tensors are, beside the others.
_FILE = "head.safetensors"


@contextmanager
def with_task(
    checkpoint: SourceCheckpoint, source: str, task: str, labels: Sequence[str], *, seed: int = 0
) -> Iterator[SourceCheckpoint]:
    """Give a checkpoint as one of another task.

    Args:
        checkpoint: Of any model that transformers has a class for with the same configuration.
        source: Where it is, for messages.
        task: One of `TASKS`.
        labels: Names of the classes; none for rewards.
        seed: Of what is drawn.

    Raises:
        ConfigError: There is no such task, or labels are missing or too many.
        CheckpointError: transformers has no such class for the model.
    """
    _check(task, labels)
    config = load_config(checkpoint.origin)
    found = class_for_task(config, task)
    if found is None:
        raise CheckpointError(
            f"{source}: transformers has no class for {task} with a {type(config).__name__}; take a model of another "
            "family"
        )
    with TemporaryDirectory(prefix="qosora-") as temporary:
        origin = Path(temporary)
        copy_files(origin, checkpoint.origin, with_code=False)
        config.architectures = [found.__name__]
        names = list(labels) or ["LABEL_0"]  # as transformers calls the one of a number
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        config.problem_type = "single_label_classification" if task == TEXTS else None
        _know_padding(config, checkpoint.origin)
        config.save_pretrained(origin)
        before, after = PlainModel(checkpoint.origin, False), PlainModel(origin, False)
        common = _common(before, after)
        kept = _kept(checkpoint.reader, before, after, common)
        located = {name for disk in kept for name in after.locate(disk)[1]}
        drawn = [name for name in after.missing(located) if name not in common]
        tensors = _drawn(after, drawn, seed)
        save_file(tensors, origin / _FILE)
        reader = _WithHead(checkpoint.reader, kept, tensors, origin / _FILE)
        yield replace(checkpoint, origin=origin, reader=reader)


def _check(task: str, labels: Sequence[str]) -> None:
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if task == REWARD and labels:
        raise ConfigError("a model of rewards gives one number: leave out labels")
    if task != REWARD and (len(labels) < 2 or len(set(labels)) < len(labels) or not all(labels)):
        raise ConfigError(f"{task} needs the names of two classes or more as labels, none twice, got {list(labels)}")


def _know_padding(config: PreTrainedConfig, origin: Path) -> None:
    """Say which token fills up: a decoder finds the end of each text by it."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        try:
            tokenizer = load_tokenizer(origin)
        except CheckpointError:  # `train` will ask for one
            return
        known = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        config.pad_token_id = text.pad_token_id = known


def _common(before: PlainModel, after: PlainModel) -> set[str]:
    """Return the tensors of the new model that the old one has, too, in the same shape."""

    def bare(plain: PlainModel, name: str) -> str:
        return name.removeprefix(f"{plain.model.base_model_prefix}.")

    known = {bare(before, name): shape for name, shape in before.shapes.items()}
    return {name for name, shape in after.shapes.items() if known.get(bare(after, name)) == shape}


def _kept(reader: TensorReader, before: PlainModel, after: PlainModel, common: set[str]) -> list[str]:
    """Return the names on disk of all tensors but those that only the head had, or that nobody needed."""
    kept, homeless = [], []
    for disk in reader.names():
        parts = after.locate(disk)[1]
        if not set(parts) & after.shapes.keys():
            homeless.append(disk)
        elif parts[1:] or reader.shape(disk) == after.shapes[parts[0]] or parts[0] in common:
            kept.append(disk)
    had = {disk for disk in homeless if set(before.locate(disk)[1]) & before.shapes.keys()}
    return kept + sorted(unexpected_tensors(before.model, set(homeless) - had))  # which will be told of


def _drawn(plain: PlainModel, names: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """Return new tensors, float32, as transformers draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
        found = {name: initialized(plain.model, name) for name in modules}
    return {name: found[name.rpartition(".")[0]][name.rpartition(".")[2]].contiguous() for name in names}


class _WithHead:
    """The tensors of a reader that are kept, and new ones."""

    def __init__(self, reader: TensorReader, kept: list[str], new: dict[str, torch.Tensor], file: Path) -> None:
        self._reader, self._kept, self._new, self._file = reader, kept, new, file

    def names(self) -> list[str]:
        return [*self._kept, *self._new]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._new[name].shape) if name in self._new else self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._new[name].dtype if name in self._new else self._reader.dtype(name)

    def file(self, name: str) -> Path:
        return self._file if name in self._new else self._reader.file(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._new[name] if name in self._new else self._reader.tensor(name)

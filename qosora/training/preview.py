"""What a run would train on, before it begins: counts, steps, and examples as the model sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qosora.data import IGNORED, ClassExample, Example, batches_by_length
from qosora.training.checks import Run, resolve_run
from qosora.training.config import TrainConfig
from qosora.training.processes import Processes
from qosora.training.run_folder import RunFolder

__all__ = ["Preview", "preview_run"]

#: A token's text, and whether the loss is about it.
Token = tuple[str, bool]
#: Tokens of an example that are shown from its beginning, and from its end where it is longer.
_SHOWN = 150
#: The same token so often is still shown each time.
_SAME = 8


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Attributes:
        examples: To train on.
        tokens: In them.
        supervised: Those that the loss is about.
        cut: Examples that are longer than `max_length`, whose end is dropped.
        lost: Supervised tokens that are dropped with them.
        dropped: Examples that are left out, as there is nothing to train on in them.
        longest: Tokens of the longest example; a preference is two of them, and a prompt has its answer in addition.
        answer: Tokens of an answer at most, where answers are rewarded.
        steps: Optimizer steps; None where packing decides.
        evaluated: Examples to evaluate on.
        precision: "bf16", "fp16" or "fp32".
        source: The base.
        seen: Whether there are images.
        shown: A few examples: the first, the longest, and one from the middle.
        largest: Makes the batch of so many of the longest examples, where there are images.
    """

    examples: int
    tokens: int
    supervised: int
    cut: int
    lost: int
    dropped: int
    longest: int
    answer: int
    steps: int | None
    evaluated: int
    precision: str
    source: str
    seen: bool
    shown: list[list[Token]]
    largest: Callable[[int], dict[str, torch.Tensor]] | None = field(repr=False)


def preview_run(config: TrainConfig) -> Preview:
    """Check a run as `train` does, and return what it would train on. Nothing is written.

    Raises:
        ConfigError: Options that cannot work, or an output folder that must not be used.
        DataError: Data that cannot be used.
        CheckpointError: The model is no qosora base.
    """
    run = resolve_run(config, RunFolder(config), Processes())
    data = run.data.tokenized
    lengths = [len(example.input_ids) for example in data.examples]
    places = [0, lengths.index(max(lengths)), len(data) // 2]
    seer = run.seer
    return Preview(
        examples=len(run.data),
        tokens=data.tokens,
        supervised=data.supervised,
        cut=data.cut,
        lost=data.lost,
        dropped=data.dropped,
        longest=max(lengths),
        answer=run.answer,
        steps=_steps(run),
        evaluated=len(run.held_out) if run.held_out else 0,
        precision=run.precision,
        source=run.source,
        seen=seer is not None,
        shown=[list(_shown(run, data.examples[place])) for place in dict.fromkeys(places)],
        largest=None if seer is None else lambda size: seer.batch(batches_by_length(data.examples, size)[0]),
    )


def _steps(run: Run) -> int | None:
    config = run.config
    if config.max_steps is not None:
        return config.max_steps
    if config.packing:
        return None
    examples = len(run.data) * (run.arguments.num_generations if config.method == "grpo" else 1)
    batches = math.ceil(examples / config.batch_size)
    return math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation))


def _shown(run: Run, example: Example) -> Iterator[Token]:
    if isinstance(example, ClassExample):
        tokens = list(_with_classes(run, example))
    else:
        tokens = list(_counted(tokens_of(run.tokenizer, example)))
    yield from tokens[:_SHOWN]
    if len(tokens) > 2 * _SHOWN:
        yield f" [... {len(tokens) - 2 * _SHOWN} tokens ...] ", False
    yield from tokens[_SHOWN:][-_SHOWN:]


def _counted(tokens: Iterable[Token]) -> Iterator[Token]:
    """Give tokens, those that follow each other many times, as an image's do, but once with their number."""
    for token, same in groupby(tokens):
        count = sum(1 for _ in same)
        yield from [token] * count if count <= _SAME or not token[0] else [(f"{token[0]} x {count}", token[1])]


def _with_classes(run: Run, example: ClassExample) -> Iterator[Token]:
    """Give each token's text and class, or all texts and one class."""
    names = run.model_config.id2label
    plain = tokens_of(run.tokenizer, Example(example.input_ids, np.full_like(example.input_ids, IGNORED)))
    if not example.of_words:
        yield from plain
        yield f" -> {names[int(example.labels[0])]}", True
        return
    for (text, _), label in zip(plain, example.labels.tolist(), strict=True):
        yield (text, False) if label == IGNORED else (f"{text}/{names[label]}", True)


def tokens_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> Iterator[Token]:
    """Give each token's text, and whether the loss is about it; together the texts are that of the example.

    A token that holds a part of a character has no text, and the one that ends the character has it.
    """
    ids: list[Any] = example.input_ids.tolist()
    before, begin = "", 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[begin:end]))
        unfinished = text.endswith("\ufffd") and end < len(ids)
        trained = bool(end > 1 and example.labels[end - 1] != IGNORED)  # the first token is predicted from nothing
        yield ("" if unfinished else text[len(before) :]), trained
        if not unfinished:
            before = text
        if end - begin > 64 and not unfinished:  # so that long examples do not take quadratic time
            begin, before = end - 1, str(tokenizer.decode(ids[end - 1 : end]))

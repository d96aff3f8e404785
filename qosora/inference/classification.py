"""How often a classifier is right: loss, accuracy and F1, of texts or of the words of texts.

    accuracy = right / all        F1 of a class = 2 · right / (said + there are)

`f1` is the mean over the classes that occur ("macro"). Where the classes are those of entities, B-X, I-X and O, it is
that of whole entities, as conlleval and seqeval count them: right is one whose kind and both ends are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from qosora.checkpoints import REWARD, TAGS, task_of
from qosora.data import (
    IGNORED,
    ClassExample,
    Columns,
    batches_by_length,
    class_batch,
    load_records,
    refuse_unfit,
    split_to_measure,
    tokenize_classes,
)
from qosora.errors import CheckpointError
from qosora.inference.generation import inference

__all__ = ["ClassResult", "Judged", "class_metrics", "class_names", "evaluate_classes", "judge", "pad_token"]


@dataclass(frozen=True)
class Judged:
    """What a classifier made of an example: the sum of its losses in nats, the classes there are, and those it said."""

    loss: float
    there: list[int]
    said: list[int]


@dataclass(frozen=True)
class ClassResult:
    """What `evaluate_classes` found.

    Attributes:
        loss: Mean cross-entropy of a class, in nats.
        accuracy: Part of the classes that are right.
        f1: As the module says.
        classes: F1 of each class, or kind of entity, that occurs.
        labels: Classes that were compared: as many as texts, or words.
        examples: Texts.
    """

    loss: float
    accuracy: float
    f1: float
    classes: dict[str, float]
    labels: int
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def evaluate_classes(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    split: str | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
) -> ClassResult:
    """Measure a classifier on data.

    Args:
        model: A classifier of texts or words, with or without an adapter.
        tokenizer: Its tokenizer.
        data: What `qosora.data.load_records` reads.
        split: Of a hub data set; "test" by default.
        columns: As in `load_records`.
        limit: As in `load_records`.
        max_length: Tokens to keep of a text.
        batch_size: Texts on the device at once.

    Raises:
        CheckpointError: It is no classifier.
        DataError: The data cannot be used.
    """
    task = task_of(model.config)
    if task is None or task == REWARD:
        raise CheckpointError(f"{model.name_or_path} is no classifier, so there are no classes to compare")
    form = "tags" if task == TAGS else "classes"
    records = load_records(data, form=form, split=split_to_measure(data, split), columns=columns, limit=limit)
    found = tokenize_classes(records, tokenizer, model.config.label2id, max_length=max_length)
    rows = [example.input_ids for example in found.examples]
    refuse_unfit(rows, model, tokenizer.name_or_path)
    judged = judge(model, found.examples, batch_size)
    names = class_names(model.config)
    measured = class_metrics(judged, names)
    return ClassResult(**measured, classes=_scores(judged, names), labels=found.supervised, examples=len(found))


def judge(model: Any, examples: Sequence[Any], batch_size: int = 8, *, part: int = 0, parts: int = 1) -> list[Judged]:
    """Have a classifier look at examples.

    Args:
        model: A classifier, with or without an adapter.
        examples: `ClassExample`s; they are taken in the order of their length.
        batch_size: On the device at once.
        part: Which of the `parts` of the batches to take: every `parts`-th from this one on.
        parts: Into how many to divide the batches.
    """
    batches = batches_by_length(examples, batch_size)
    with inference(model):
        return [judged for batch in batches[part::parts] for judged in _judged(model, batch)]


def _judged(model: Any, examples: Sequence[ClassExample]) -> Iterator[Judged]:
    device = model.get_input_embeddings().weight.device
    batch = {name: tensor.to(device) for name, tensor in class_batch(examples, pad_token(model.config)).items()}
    labels = batch.pop("labels").cpu()
    logits = model(**batch).logits.float().cpu()
    if labels.ndim == 1:
        labels, logits = labels[:, None], logits[:, None]
    for row, scores in zip(labels, logits, strict=True):
        chosen = row != IGNORED
        there, scores = row[chosen], scores[chosen]
        loss = F.cross_entropy(scores, there, reduction="sum").item()
        yield Judged(loss, there.tolist(), scores.argmax(-1).tolist())


def pad_token(config: Any) -> int:
    """Return the token that a model knows as filling up, or any."""
    found = config.get_text_config().pad_token_id
    return 0 if found is None else int(found)


def class_names(config: Any) -> list[str]:
    """Return the names of a classifier's classes, by their numbers."""
    return [config.id2label[i] for i in range(config.num_labels)]


def class_metrics(judged: Sequence[Judged], names: Sequence[str]) -> dict[str, float]:
    """Return loss, accuracy and F1.

    Args:
        judged: At least one, with a class.
        names: Of the classes.
    """
    count = sum(len(one.there) for one in judged)
    right = sum(a == b for one in judged for a, b in zip(one.there, one.said, strict=True))
    loss = sum(one.loss for one in judged) / count
    scores = _scores(judged, names)
    if _of_entities(names):
        f1 = _f1(*map(sum, zip(*_counts(judged, names).values(), strict=True))) if scores else 0.0
    else:
        f1 = sum(scores.values()) / len(scores)
    return {"loss": loss, "accuracy": right / count, "f1": f1}


def _scores(judged: Sequence[Judged], names: Sequence[str]) -> dict[str, float]:
    """Return the F1 of each class, or kind of entity, that occurs."""
    return {name: _f1(*counts) for name, counts in sorted(_counts(judged, names).items())}


def _f1(right: int, said: int, there: int) -> float:
    return 2 * right / (said + there) if said + there else 0.0


def _counts(judged: Sequence[Judged], names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Return how often each class, or kind of entity, was right, was said, and was there."""
    entities = _of_entities(names)
    right, said, there = Counter[str](), Counter[str](), Counter[str]()
    for one in judged:
        if entities:
            spans = [set(_entities([names[i] for i in classes])) for classes in (one.there, one.said)]
        else:
            spans = [{(names[c], i, i) for i, c in enumerate(classes)} for classes in (one.there, one.said)]
        there.update(kind for kind, *_ in spans[0])
        said.update(kind for kind, *_ in spans[1])
        right.update(kind for kind, *_ in spans[0] & spans[1])
    return {kind: (right[kind], said[kind], there[kind]) for kind in there | said}


def _of_entities(names: Sequence[str]) -> bool:
    return "O" in names and len(names) > 1 and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def _entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Give kind, beginning and end of each entity; an I that goes on with nothing of its kind begins one."""
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        if kind and (tag[:2] != "I-" or tag[2:] != kind):
            yield kind, start, i
            kind = ""
        if tag != "O" and not kind:
            start, kind = i, tag[2:]

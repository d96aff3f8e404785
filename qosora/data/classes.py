"""Texts with a class, and texts with a class for each word, as tokens.

Tokenized by the tokenizer itself, with the special tokens and segments of its model. Of a word's tokens the first has
the class, as is usual; the others count for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qosora.data.batch import padded
from qosora.data.records import Records
from qosora.data.tokens import IGNORED, Example, Tokenized
from qosora.errors import DataError

__all__ = ["ClassExample", "class_batch", "tokenize_classes"]

logger = logging.getLogger("qosora")


@dataclass(frozen=True)
class ClassExample(Example):
    """Token ids, (length,), int32, with one class, (1,), or one for each token that has one, else `IGNORED`, (length,).

    Args:
        of_words: Whether the classes are those of tokens.
        segments: Which of two texts a token is of, (length,), int32, where the model asks.
    """

    of_words: bool = False
    segments: np.ndarray[Any, Any] | None = None

    @property
    def supervised(self) -> int:
        """Number of classes that the loss is about."""
        return int((self.labels != IGNORED).sum())


def tokenize_classes(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    classes: Mapping[str, int],
    *,
    max_length: int | None = None,
) -> Tokenized:
    """Tokenize texts with classes, and count.

    Args:
        records: Of kind "classes" or "tags".
        tokenizer: Of the model; for tags one that knows which word a token is of.
        classes: Numbers of the model's classes, by name.
        max_length: Tokens to keep of a text, special ones included; no more than the tokenizer says the model takes.

    Raises:
        DataError: A class that the model has not, or no class is left.
    """
    if records.kind == "tags" and not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} does not tell which word a token is of; get its fast version")
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    examples, cut, lost, longest = [], 0, 0, 0
    for number, row in enumerate(records.rows, 1):
        try:
            whole = _example(row, tokenizer, classes, None)
            example = whole
            if len(whole.input_ids) > limit:
                example = _example(row, tokenizer, classes, limit)
        except DataError as error:
            raise DataError(f"{records.name} example {number}: {error}") from None
        cut += example is not whole
        longest = max(longest, len(whole.input_ids))
        lost += whole.supervised - example.supervised
        examples.append(example)
    kept = [example for example in examples if example.supervised]
    if not kept:
        raise DataError(f"{records.name}: none of the {len(examples)} examples has a class left at {limit} tokens")
    if cut:
        logger.warning(
            "%s: %d tokens is the most of a text, which cuts %d of %d examples; %d classes of words are lost. "
            "The longest has %d tokens", records.name, limit, cut, len(examples), lost, longest,
        )  # fmt: skip
    return Tokenized(
        kept,
        tokens=sum(len(e.input_ids) for e in kept),
        supervised=sum(e.supervised for e in kept),
        lost=lost,
        cut=cut,
        dropped=len(examples) - len(kept),
    )


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a tokenizer is given."""
    if "tokens" in row:
        return {"text": row["tokens"], "is_split_into_words": True}
    return {"text": row["text"], "text_pair": row.get("text_pair")}


def _example(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, classes: Mapping[str, int], max_length: int | None
) -> ClassExample:
    limits = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded = tokenizer(**_texts(row), **limits, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    if not len(ids):
        raise DataError("it has no token")
    segments = encoded.get("token_type_ids")
    found = None if segments is None else np.array(segments, dtype=np.int32)
    if "label" in row:
        return ClassExample(ids, np.array([_number(row["label"], classes)], dtype=np.int32), False, found)
    if len(row["tags"]) != len(row["tokens"]):
        raise DataError(f"{len(row['tokens'])} words and {len(row['tags'])} tags; there must be as many")
    numbers = [_number(tag, classes) for tag in row["tags"]]
    labels, before = np.full_like(ids, IGNORED), None
    for place, word in enumerate(encoded.word_ids()):
        if word is not None and word != before:
            labels[place] = numbers[word]
        before = word
    return ClassExample(ids, labels, True, found)


def _number(label: str | int, classes: Mapping[str, int]) -> int:
    """Return a class's number; data sets of the hub have these, and files either."""
    if label in classes:
        return classes[str(label)]
    text = str(int(label) if isinstance(label, bool) else label)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise DataError(f"the class {label!r} is none of the model's: {', '.join(classes)}")


def class_batch(examples: Sequence[ClassExample], pad: int) -> dict[str, torch.Tensor]:
    """Return what a classifier takes, padded on the right, int64.

    Args:
        examples: With a class, or with tags.
        pad: Token to fill up with: models tell by it where a text ends.

    Returns:
        input_ids and attention_mask, (examples, longest); labels, (examples,) or the same; token_type_ids where the
        examples have segments.
    """
    made = {
        "input_ids": padded([e.input_ids for e in examples], pad),
        "attention_mask": padded([np.ones_like(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORED),
    }
    if not examples[0].of_words:
        made["labels"] = made["labels"][:, 0]
    if examples[0].segments is not None:
        made["token_type_ids"] = padded([e.segments for e in examples if e.segments is not None], 0)
    return made

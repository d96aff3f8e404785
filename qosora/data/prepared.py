"""Records as a trainer of TRL takes them, and as tokens, which are counted and looked at before it begins.

Examples to imitate are handed over as tokens. What is compared or rewarded is handed over as text, which TRL tokenizes
with the same tokenizer and template.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from qosora.data.chat import as_taken
from qosora.data.classes import tokenize_classes
from qosora.data.records import Records
from qosora.data.tokens import Tokenized, tokenize, tokenize_prompts
from qosora.data.vision import Seer
from qosora.errors import DataError, first_line

__all__ = ["Prepared", "prepare"]

logger = logging.getLogger("qosora")


@dataclass(frozen=True)
class Prepared:
    """Data for a trainer.

    Args:
        tokenized: All sequences: of a preference there are two, first those that are chosen.
        dataset: What TRL trains on.
    """

    tokenized: Tokenized
    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def digest(self) -> str:
        """Return the SHA-256 of all tokens and, where there is more, of all columns."""
        found = self.tokenized.digest()
        if not {"input_ids", "chosen_ids"}.isdisjoint(self.dataset.column_names):
            return found
        columns = json.dumps(self.dataset.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(f"{found}{columns}".encode()).hexdigest()


def prepare(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    completion_only: bool | None = None,
    stop_ids: Collection[int] = (),
    classes: Mapping[str, int] | None = None,
    seer: Seer | None = None,
    as_pairs: bool = False,
) -> Prepared:
    """Tokenize records, and bring them into the form of TRL.

    Args:
        records: Of any kind.
        tokenizer: With a chat template, if there are messages.
        max_length: Tokens to keep of a sequence.
        completion_only: As in `tokenize`, for examples to imitate.
        stop_ids: As in `tokenize`.
        classes: As in `tokenize_classes`, for texts and words with classes.
        seer: What takes examples with images.
        as_pairs: Whether preferences are compared as wholes, by a model of rewards, and not learned to be written; one
            that is longer than `max_length` is left out, as it would lose what differs.

    Raises:
        DataError: No supervised token is left, a chat cannot be rendered, or values of a column are of different types.
    """
    if classes is not None:
        tokenized = tokenize_classes(records, tokenizer, classes, max_length=max_length)
        return Prepared(tokenized, Dataset.from_dict(tokenized.columns()))
    if records.seen:
        if records.kind not in ("prompt-completion", "messages"):
            raise DataError(f"{records.name} has images, which only method sft takes; leave out their column")
        if seer is None:
            raise DataError(
                f"{records.name} has images, and the model takes none: leave out the column, or take another model"
            )
        tokenized = seer.tokenize(records, max_length=max_length)
        numbers = {"number": list(range(len(tokenized)))}
        return Prepared(tokenized, Dataset.from_dict({**tokenized.columns(), **numbers}))
    if as_pairs:
        return _pairs(records, tokenizer, max_length)
    options: dict[str, Any] = {"max_length": max_length, "stop_ids": stop_ids}
    if records.kind == "preference":
        parts, answers = ["prompt", "chosen", "rejected"], ["chosen", "rejected"]
    elif records.kind == "labeled":
        parts, answers = ["prompt", "completion", "label"], ["completion"]
    elif records.kind == "prompts":
        return Prepared(tokenize_prompts(records, tokenizer), _dataset(records, tokenizer, ["prompt"]))
    else:
        tokenized = tokenize(records, tokenizer, completion_only=completion_only, **options)
        return Prepared(tokenized, Dataset.from_dict(tokenized.columns()))
    rows = [{**row, "completion": row[part]} for part in answers for row in records.rows]
    sequences = replace(records, kind="prompt-completion", rows=rows)
    return Prepared(tokenize(sequences, tokenizer, **options), _dataset(records, tokenizer, parts))


def _pairs(records: Records, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Prepared:
    """Return preferences as pairs of tokens, which are all looked at."""
    rows = [{**row, "completion": row[part]} for part in ("chosen", "rejected") for row in records.rows]
    found = tokenize(replace(records, kind="prompt-completion", rows=rows), tokenizer, completion_only=False).examples
    if len(found) < len(rows):
        raise DataError(f"{records.name}: {len(rows) - len(found)} answers with their prompt have a single token")
    pairs = list(zip(found[: len(records)], found[len(records) :], strict=True))
    kept = [pair for pair in pairs if max_length is None or max(len(e.input_ids) for e in pair) <= max_length]
    longest = max(len(e.input_ids) for e in found)
    if not kept:
        raise DataError(
            f"{records.name}: all {len(pairs)} examples are longer than max_length={max_length}; the longest has "
            f"{longest} tokens"
        )
    if left := len(pairs) - len(kept):
        logger.warning(
            "%s: %d of %d examples are left out, as they are longer than max_length=%s; the longest has %d tokens",
            records.name, left, len(pairs), max_length, longest,
        )  # fmt: skip
    examples = [e for side in zip(*kept, strict=True) for e in side]
    columns = {name: [pair[i].input_ids for pair in kept] for i, name in enumerate(("chosen_ids", "rejected_ids"))}
    tokens = sum(len(e.input_ids) for e in examples)
    made = Tokenized(examples, tokens, supervised=sum(e.supervised for e in examples), lost=0, cut=0, dropped=2 * left)
    return Prepared(made, Dataset.from_dict(columns))


def _dataset(records: Records, tokenizer: PreTrainedTokenizerBase, parts: list[str]) -> Dataset:
    """Return rows as a data set, with the other columns that TRL hands on: to rewards all, to a template its own."""
    columns: dict[str, list[Any]] = {
        part: [as_taken(tokenizer, row[part]) if isinstance(row[part], list) else row[part] for row in records.rows]
        for part in parts
    }
    others = [row.get("columns", {}) for row in records.rows]
    for name in dict.fromkeys(name for row in others for name in row):
        values = [row.get(name) for row in others]
        if records.kind == "prompts":
            # TRL gives rewards what the model says as the completion
            columns["answer" if name == "completion" and "answer" not in others[0] else name] = values
        elif name == "tools":  # as text: they have no common structure
            columns[name] = [json.dumps(value) if value and not isinstance(value, str) else value for value in values]
        elif name == "chat_template_kwargs":
            columns[name] = values
    try:
        return Dataset.from_dict(columns)
    except (ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{records.name}: the values of a column must be of one type ({first_line(error)})") from None

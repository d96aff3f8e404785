"""Records as a trainer of TRL takes them, and as tokens, which are counted and looked at before it begins.

Examples to imitate are handed over as tokens. What is compared or rewarded is handed over as text, which TRL tokenizes
with the same tokenizer and template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from qosora.data.records import Records
from qosora.data.tokens import Tokenized, tokenize, tokenize_prompts
from qosora.errors import DataError, first_line

__all__ = ["Prepared", "prepare"]


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
        if "input_ids" in self.dataset.column_names:
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
) -> Prepared:
    """Tokenize records, and bring them into the form of TRL.

    Args:
        records: Of any kind.
        tokenizer: With a chat template, if there are messages.
        max_length: Tokens to keep of a sequence.
        completion_only: As in `tokenize`, for examples to imitate.
        stop_ids: As in `tokenize`.

    Raises:
        DataError: No supervised token is left, a chat cannot be rendered, or values of a column are of different types.
    """
    options: dict[str, Any] = {"max_length": max_length, "stop_ids": stop_ids}
    if records.kind == "preference":
        parts, answers = ["prompt", "chosen", "rejected"], ["chosen", "rejected"]
    elif records.kind == "labeled":
        parts, answers = ["prompt", "completion", "label"], ["completion"]
    elif records.kind == "prompts":
        return Prepared(tokenize_prompts(records, tokenizer), _dataset(records, ["prompt"]))
    else:
        tokenized = tokenize(records, tokenizer, completion_only=completion_only, **options)
        return Prepared(tokenized, Dataset.from_dict(tokenized.columns()))
    rows = [{**row, "completion": row[part]} for part in answers for row in records.rows]
    sequences = replace(records, kind="prompt-completion", rows=rows)
    return Prepared(tokenize(sequences, tokenizer, **options), _dataset(records, parts))


def _dataset(records: Records, parts: list[str]) -> Dataset:
    """Return rows as a data set, with the other columns that TRL hands on: to rewards all, to a template its own."""
    columns: dict[str, list[Any]] = {part: [row[part] for row in records.rows] for part in parts}
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

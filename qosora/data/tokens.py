"""Records to token ids and labels, and a count of what is trained on.

Tokenized as TRL would: a prompt is tokenized with its completion, the completion begins where the two differ from the
prompt alone, and plain completions and texts end with the end-of-sequence token. It is done here, and the result is
handed to TRL tokenized, so that the tokens counted are the tokens trained on. Unlike TRL, chats are trained on the
assistant's turns alone by default, with any chat template: `chat` finds them.

A label counts where it is not -100 and not first: label i is predicted from the tokens before i.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qosora.data.chat import encode, render, template_options, turn_spans
from qosora.data.records import Records
from qosora.errors import DataError

__all__ = ["IGNORED", "Example", "Tokenized", "tokenize", "tokenize_prompts"]

logger = logging.getLogger("qosora")

IGNORED = -100
_BATCH = 1000  # texts for a call of the tokenizer, which works on them in parallel


@dataclass(frozen=True)
class Example:
    """Token ids and labels, (length,), int32; `IGNORED` where a token is not trained on."""

    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]

    @property
    def supervised(self) -> int:
        """Number of tokens that the loss is about."""
        return int((self.labels[1:] != IGNORED).sum())

    def cut(self, length: int) -> Example:
        """Return the first `length` tokens."""
        return Example(self.input_ids[:length], self.labels[:length])


@dataclass(frozen=True)
class Tokenized:
    """Examples with supervised tokens, and what was lost on the way.

    Args:
        examples: Each has supervised tokens.
        tokens: Tokens in them.
        supervised: Supervised tokens in them.
        lost: Supervised tokens that truncation dropped.
        cut: Examples that truncation shortened.
        dropped: Examples that have no supervised token (left).
    """

    examples: Sequence[Example]
    tokens: int
    supervised: int
    lost: int
    cut: int
    dropped: int

    def __len__(self) -> int:
        return len(self.examples)

    def digest(self) -> str:
        """Return the SHA-256 of all ids and labels, in order."""
        found = hashlib.sha256()
        for example in self.examples:
            for values in (example.input_ids, example.labels):
                found.update(len(values).to_bytes(8, "little"))
                found.update(np.ascontiguousarray(values, dtype="<i4").tobytes())
        return found.hexdigest()

    def columns(self) -> dict[str, list[np.ndarray[Any, Any]]]:
        """Return the columns of a data set that TRL takes as tokenized."""
        return {"input_ids": [e.input_ids for e in self.examples], "labels": [e.labels for e in self.examples]}


def tokenize(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    completion_only: bool | None = None,
    stop_ids: Collection[int] = (),
) -> Tokenized:
    """Tokenize records, truncate them, and count. Images are left out, which is told: `Seer` takes them.

    Args:
        records: Of any kind.
        tokenizer: With a chat template, if there are messages.
        max_length: Tokens to keep of an example.
        completion_only: Whether completions (assistant turns) alone are trained on; by default where there are any.
        stop_ids: Token ids that end generation, besides the tokenizer's; a warning tells if no example has one.

    Raises:
        DataError: No supervised token is left, or a chat cannot be rendered.
    """
    if completion_only and records.kind == "text":
        raise DataError(f"{records.name}: completion_only needs prompts or messages, but the data is plain text")
    _require_template(records, tokenizer)
    if seen := sum(bool(row.get("images")) for row in records.rows):
        logger.warning("%s: the images of %d examples are left out, as text alone is read here", records.name, seen)
    unfound: list[int] = []  # turns of the assistant, by example
    whole = list(_examples(records, tokenizer, completion_only is not False, unfound))
    if any(unfound):
        logger.warning(
            "%s: %d of the assistant's turns, in %d examples, are not trained on, as the chat template leaves "
            "out what they say, or part of it", records.name, sum(unfound), sum(map(bool, unfound)),
        )  # fmt: skip
    result = _truncated(whole, max_length)
    if not result.examples:
        raise DataError(_nothing_left(records, whole, max_length))
    if result.lost or result.dropped:
        _warn_of_losses(records, whole, result, max_length)
    _warn_of_no_stop(records, result, {*stop_ids, tokenizer.eos_token_id})
    return result


def tokenize_prompts(records: Records, tokenizer: PreTrainedTokenizerBase) -> Tokenized:
    """Tokenize prompts as they are handed to a model that is to answer; nothing in them is supervised.

    Raises:
        DataError: A chat cannot be rendered.
    """
    _require_template(records, tokenizer)
    texts = []
    for number, row in enumerate(records.rows, 1):
        try:
            prompt = row["prompt"]
            texts.append(prompt if isinstance(prompt, str) else render(tokenizer, prompt, generation=True))
        except DataError as error:
            raise DataError(f"{records.name} example {number}: {error}") from None
    ids = encode(tokenizer, texts, special_tokens=not _has_messages(records))
    return Tokenized([_example(i, []) for i in ids], tokens=sum(map(len, ids)), supervised=0, lost=0, cut=0, dropped=0)


def _require_template(records: Records, tokenizer: PreTrainedTokenizerBase) -> None:
    if _has_messages(records) and not tokenizer.chat_template:
        raise DataError(
            f"{records.name} holds chat messages, but the tokenizer has no chat template. Put the chat_template.jinja "
            "of the model's chat version into its folder, or use columns of text"
        )


def _has_messages(records: Records) -> bool:
    return records.kind == "messages" or not isinstance(next(iter(records.rows[0].values())), str)


def _examples(
    records: Records, tokenizer: PreTrainedTokenizerBase, completion_only: bool, unfound: list[int]
) -> Iterator[Example]:
    if _has_messages(records):
        for number, row in enumerate(records.rows, 1):
            try:
                example, missing = _chat_example(row, tokenizer, completion_only)
            except DataError as error:
                raise DataError(f"{records.name} example {number}: {error}") from None
            unfound.append(missing)
            yield example
        return
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so the model could not learn where to stop")
    for start in range(0, len(records), _BATCH):
        rows = records.rows[start : start + _BATCH]
        texts = [row.get("prompt", "") + row.get("completion", row.get("text", "")) for row in rows]
        ids = encode(tokenizer, texts)
        prompts = encode(tokenizer, [row["prompt"] for row in rows]) if "prompt" in rows[0] else [[]] * len(rows)
        for full, prompt in zip(ids, prompts, strict=True):
            if full[-1:] != [tokenizer.eos_token_id]:
                full.append(tokenizer.eos_token_id)
            yield _example(full, [(_common(prompt, full) if completion_only else 0, len(full))])


def _chat_example(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, completion_only: bool
) -> tuple[Example, int]:
    """Return a chat, and how many turns of the assistant were not found in it."""
    messages = row.get("messages") or row["prompt"] + row["completion"]
    if "prompt" in row:
        turns = [(len(row["prompt"]), len(messages))]
    else:
        turns = [(i, i + 1) for i, message in enumerate(messages) if message["role"] == "assistant"]
    options = template_options(tokenizer, row.get("columns", {}))
    text, spans = turn_spans(tokenizer, messages, turns if completion_only else [], options)
    full = encode(tokenizer, [text], special_tokens=False)[0]
    if not completion_only:
        return _example(full, [(0, len(full))]), 0
    found = [span for span in spans if span[0] < span[1]]
    ends = sorted({position for span in found for position in span} - {0, len(text)})
    cuts = encode(tokenizer, [text[:end] for end in ends], special_tokens=False) if ends else []
    at = {0: 0, len(text): len(full)} | {end: _common(ids, full) for end, ids in zip(ends, cuts, strict=True)}
    return _example(full, [(at[start], at[end]) for start, end in found]), len(spans) - len(found)


def _common(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


def _example(ids: list[int], spans: list[tuple[int, int]]) -> Example:
    input_ids = np.array(ids, dtype=np.int32)
    labels = np.full_like(input_ids, IGNORED)
    for start, end in spans:
        labels[start:end] = input_ids[start:end]
    return Example(input_ids, labels)


def _truncated(whole: list[Example], max_length: int | None) -> Tokenized:
    cut = [e.cut(max_length) if max_length is not None else e for e in whole]
    kept = [e for e in cut if e.supervised]
    supervised = sum(e.supervised for e in kept)
    return Tokenized(
        examples=kept,
        tokens=sum(len(e.input_ids) for e in kept),
        supervised=supervised,
        lost=sum(e.supervised for e in whole) - supervised,
        cut=sum(len(a.input_ids) < len(b.input_ids) for a, b in zip(cut, whole, strict=True)),
        dropped=len(whole) - len(kept),
    )


def _nothing_left(records: Records, whole: list[Example], max_length: int | None) -> str:
    count = f"none of the {len(whole)} examples has a token to train on"
    trainable = [e for e in whole if e.supervised]
    if trainable and max_length is not None:
        needed = min(int((e.labels != IGNORED).argmax()) for e in trainable) + 1
        return (
            f"{records.name}: {count}: the prompts alone fill max_length={max_length}. Raise it to at least {needed}, "
            f"for whole examples to {max(len(e.input_ids) for e in trainable)}, or shorten the prompts"
        )
    reason = "no message is the assistant's" if records.kind == "messages" else "they are a single token long"
    return f"{records.name}: {count}: {reason}"


def _warn_of_losses(records: Records, whole: list[Example], result: Tokenized, max_length: int | None) -> None:
    total = result.supervised + result.lost
    longest = max(len(e.input_ids) for e in whole)
    logger.warning(
        "%s: %d of %d supervised tokens (%.1f %%) are lost, as max_length=%s cuts %d of %d examples; %d examples are "
        "left out, having none. The longest example has %d tokens",
        records.name, result.lost, total, 100 * result.lost / total, max_length, result.cut, len(whole),
        result.dropped, longest,
    )  # fmt: skip


def _warn_of_no_stop(records: Records, result: Tokenized, stop_ids: set[int | None]) -> None:
    """Tell of chats that never show the model where to stop: the template's turn end is no stop token of the model."""
    stops = np.array(sorted(i for i in stop_ids if i is not None), dtype=np.int32)
    if not result.cut and not any(np.isin(e.labels, stops).any() for e in result.examples[:100]):
        logger.warning(
            "%s: the examples never end with a token that stops generation (%s), so the model will not learn to stop. "
            "Does the chat template belong to this model?", records.name, stops.tolist(),
        )  # fmt: skip

"""Whether tokens fit a model: what does not would end in an index error deep inside, on a GPU in a failed assertion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from qosora.errors import DataError

__all__ = [
    "embedding_rows",
    "learned_positions",
    "most_positions",
    "pad_within",
    "refuse_foreign_tokens",
    "refuse_too_long",
    "refuse_unfit",
]


def refuse_foreign_tokens(rows: Iterable[Sequence[int] | np.ndarray[Any, Any]], vocabulary: int, source: str) -> None:
    """Raise DataError if a token has no embedding.

    Args:
        rows: Token ids.
        vocabulary: Number of embeddings.
        source: Where the tokenizer is from, for the message.
    """
    largest = max((int(np.max(row)) for row in rows if len(row)), default=0)
    if largest >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {vocabulary}: the tokenizer files in "
            f"{source} belong to another model, or tokens were added without resizing the model's embeddings"
        )


def refuse_too_long(length: int, positions: int | None, remedy: str) -> None:
    """Raise DataError if a text has more tokens than the model has positions.

    Args:
        length: Of the text, in tokens.
        positions: Of the model; None for any number.
        remedy: What to do, for the message.
    """
    if positions is not None and length > positions:
        raise DataError(f"a text has {length} tokens, but the model takes {positions}; {remedy}")


def most_positions(config: Any) -> int | None:
    """Return how many tokens a text may have for a model of a configuration; None where there is no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None  # XLNet's is -1


def embedding_rows(model: Any) -> int:
    """Return how many tokens a model has embeddings for."""
    return len(model.get_input_embeddings().weight)


def pad_within(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Have a tokenizer pad with a token that the model has: which one makes no difference; some add [PAD] beyond it.

    Args:
        tokenizer: Changed where it has none, or one without an embedding.
        vocabulary: Number of embeddings.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def learned_positions(model: Any) -> int | None:
    """Return how many positions a model has, where it learned an embedding for each, as GPT-2 did; else None."""
    positions = most_positions(model.config)
    tokens = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    # OPT's table has two rows more.
    learned = positions is not None and any(0 <= len(table.weight) - positions <= 2 for table in tables)
    return positions if learned else None


def refuse_unfit(rows: Sequence[Sequence[int] | np.ndarray[Any, Any]], model: Any, source: str) -> None:
    """Raise DataError if a token of texts to measure has no embedding, or a text has more than the model's positions.

    Args:
        rows: Token ids, of at least one text.
        model: That is measured.
        source: Where the tokenizer is from, for the message.
    """
    refuse_foreign_tokens(rows, embedding_rows(model), source)
    positions = learned_positions(model)
    refuse_too_long(max(map(len, rows)), positions, f"set max_length to at most {positions}")

"""What a model wrote before it was trained, and what it writes now, beside what the data say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qosora.base import load_adapted, load_tokenizer
from qosora.checkpoints import split_source
from qosora.data import text_of
from qosora.errors import ConfigError
from qosora.inference import generate
from qosora.training.checks import records_of
from qosora.training.config import RUN_CONFIG, TrainConfig

__all__ = ["Answer", "answers_of"]


@dataclass(frozen=True)
class Answer:
    """Answers to a prompt.

    Attributes:
        prompt: A text, or the last turn of a chat.
        expected: What the data say, if they do.
        before: By the base, or by the adapter that the run went on with.
        after: With what was trained.
    """

    prompt: str
    expected: str | None
    before: str
    after: str


def answers_of(folder: str | Path, count: int, *, max_new_tokens: int = 128) -> list[Answer]:
    """Answer the first prompts of what a run was evaluated on, or else trained on, before it and after it.

    Args:
        folder: Of the run, which has ended.
        count: How many.
        max_new_tokens: Of an answer.

    Raises:
        CheckpointError: The base or the adapter cannot be loaded.
        ConfigError: The data are plain text, so they have no prompts.
        DataError: The data cannot be read any more.
    """
    config = TrainConfig.load(Path(folder) / RUN_CONFIG)
    records = records_of(config, held_out=config.eval_data is not None, limit=count)
    if records.kind == "text":
        raise ConfigError(f"{folder}: answers need prompts, but {records.name} is plain text")
    rows = [_parted(row) for row in records.rows]
    base, adapter = split_source(folder)
    how: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    model = load_adapted(base, adapter, **how)
    tokenizer = load_tokenizer(adapter, base, **how)
    _, begun = split_source(config.model)
    prompts = [prompt for prompt, _ in rows]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "images": [row.get("images", []) for row in records.rows],
        "folder": records.folder,
    }  # fmt: skip
    if begun is None:
        with model.disable_adapter():
            before = generate(model, tokenizer, prompts, **options)
    else:
        before = generate(load_adapted(base, begun, **how), tokenizer, prompts, **options)
    after = generate(model, tokenizer, prompts, **options)
    return [
        Answer(prompt if isinstance(prompt, str) else text_of(prompt[-1].get("content")) or "", expected, *written)
        for (prompt, expected), *written in zip(rows, before, after, strict=True)
    ]


def _parted(row: dict[str, Any]) -> tuple[Any, str | None]:
    """Return the prompt of a row, and the answer that the data want, as far as it is text."""
    if messages := row.get("messages"):
        last = messages[-1]["role"] == "assistant" and len(messages) > 1
        prompt, answer = (messages[:-1], messages[-1:]) if last else (messages, None)
    else:
        prompt, answer = row["prompt"], row.get("chosen", row.get("completion") if row.get("label", True) else None)
    if isinstance(answer, list):
        answer = answer[-1].get("content") if answer else None
    return prompt, text_of(answer)

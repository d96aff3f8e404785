"""Loss and perplexity of supervised tokens, and exact match of generated answers.

    loss = Σ -log p(token) / number of supervised tokens        perplexity = exp(loss)

The mean is over tokens, not over batches, so it does not depend on the batch size. Logits are built for supervised
positions only, some at a time, so memory stays flat whatever the length and the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import regex
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qosora.checkpoints import model_class_of, require_language_model, sees
from qosora.data import (
    IGNORED,
    Columns,
    Example,
    Records,
    batches_by_length,
    embedding_rows,
    load_records,
    padded_batch,
    refuse_unfit,
    split_to_measure,
    template_options,
    text_of,
    tokenize,
)
from qosora.errors import ConfigError, DataError, QosoraError, first_line
from qosora.inference.generation import Prompt, generate, inference, seer_of, stop_token_ids
from qosora.layers import backbone_module, exchanged_forward, name_backbone

__all__ = [
    "EvalResult",
    "Sample",
    "batch_losses",
    "evaluate",
    "logits_of_states",
    "logits_rows",
    "mean_loss",
    "on_text_alone",
    "perplexity",
    "returning",
]

#: Logits held at once: 256 MiB in float32.
_LOGITS = 2**26
#: Seconds to look for a pattern in an answer: some take for ever.
_PATIENCE = 5.0


@dataclass(frozen=True)
class Sample:
    """A generated answer beside the expected one."""

    prompt: Prompt
    expected: str
    generated: str
    match: bool


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found; `tokens` counts the supervised ones, `exact_match` is a fraction of the examples."""

    loss: float
    perplexity: float
    tokens: int
    examples: int
    exact_match: float | None = None
    samples: list[Sample] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Records | Iterable[Mapping[str, Any]],
    *,
    split: str | None = None,
    columns: Columns | None = None,
    chat: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    completion_only: bool | None = None,
    batch_size: int = 8,
    exact_match: bool = False,
    answer_pattern: str | None = None,
    max_new_tokens: int = 256,
    samples: int = 5,
) -> EvalResult:
    """Measure a model on data.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        data: What `qosora.data.records.load_records` reads, or its result.
        split: Of a hub data set; "test" by default.
        columns: As in `load_records`.
        chat: As in `load_records`.
        limit: As in `load_records`.
        max_length: Tokens to keep of an example; all by default.
        completion_only: As in `qosora.data.tokens.tokenize`.
        batch_size: Examples on the device at once.
        exact_match: Whether to generate answers (greedily) and compare them with the expected ones, apart from white
            space around them.
        answer_pattern: Regular expression; the last thing it finds (its first group, if it has one) is compared
            instead, such as r"#### (.+)" for GSM8K.
        max_new_tokens: Of an answer.
        samples: Answers to return.

    Raises:
        CheckpointError: It is no causal language model.
        DataError: The data cannot be used.
        ConfigError: `answer_pattern` is no regular expression.
    """
    require_language_model(model.config, model.name_or_path, "evaluation")
    pattern = _compiled(answer_pattern)
    if not isinstance(data, Records):
        data = load_records(data, split=split_to_measure(data, split), columns=columns, chat=chat, limit=limit)
    pairs = _answers(data) if exact_match else []
    options = [template_options(tokenizer, row.get("columns", {})) for row in data.rows] if exact_match else []
    if data.seen:
        result = _seen(model, tokenizer, data, batch_size, max_length, completion_only is not False)
    else:
        stops = stop_token_ids(model, tokenizer)
        tokenized = tokenize(data, tokenizer, max_length=max_length, completion_only=completion_only, stop_ids=stops)
        refuse_unfit([example.input_ids for example in tokenized.examples], model, tokenizer.name_or_path)
        loss = mean_loss(model, tokenized.examples, batch_size)
        result = EvalResult(loss, perplexity(loss), tokenized.supervised, len(tokenized))
    if not exact_match:
        return result
    texts = generate(
        model,
        tokenizer,
        [prompt for prompt, _ in pairs],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        template_options=options,
        images=[row.get("images", []) for row in data.rows],
        folder=data.folder,
    )
    found = [
        Sample(prompt, expected, text, _same(text, expected, pattern))
        for (prompt, expected), text in zip(pairs, texts, strict=True)
    ]
    rate = sum(s.match for s in found) / len(found)
    return replace(result, exact_match=rate, samples=found[:samples])


def _seen(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: Records, size: int, max_length: int | None, only: bool
) -> EvalResult:
    """Measure a model that sees, on examples with images."""
    if not sees(model.config):
        raise DataError(f"{data.name} has images, and the model takes none; leave out their column")
    seer = seer_of(tokenizer.name_or_path, embedding_rows(model), completion_only=only, dtype=model.dtype)
    found = seer.tokenize(data, max_length=max_length)
    total = 0.0
    device = model.get_input_embeddings().weight.device
    with inference(model):
        for examples in batches_by_length(found.examples, size):
            batch = {name: tensor.to(device) for name, tensor in seer.batch(examples).items()}
            targets = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            chosen = targets != IGNORED
            total += F.cross_entropy(logits[chosen].float(), targets[chosen], reduction="sum").item()
    loss = total / found.supervised
    return EvalResult(loss, perplexity(loss), found.supervised, len(found))


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that is too large."""
    return math.exp(loss) if loss < 700 else math.inf


def mean_loss(model: Any, examples: Sequence[Example], batch_size: int = 8) -> float:
    """Return the mean cross-entropy of the supervised tokens, in nats.

    Args:
        model: A causal language model, with or without an adapter.
        examples: At least one has supervised tokens.
        batch_size: Examples on the device at once.
    """
    total = sum(batch_losses(model, examples, batch_size))
    return total / sum(e.supervised for e in examples)


def batch_losses(
    model: Any, examples: Sequence[Example], batch_size: int = 8, *, part: int = 0, parts: int = 1
) -> list[float]:
    """Return the sum of the cross-entropy of the supervised tokens of each batch, in nats.

    Args:
        model: A causal language model, with or without an adapter.
        examples: Taken in the order of their length: the largest batch first, and little padding.
        batch_size: Examples on the device at once.
        part: Which of the `parts` of the batches to take: every `parts`-th from this one on.
        parts: Into how many to divide the batches.
    """
    batches = batches_by_length(examples, batch_size)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    name_backbone(causal)
    with inference(model), on_text_alone(causal.config):
        return [_loss_sum(causal, batch) for batch in batches[part::parts]]


@contextmanager
def on_text_alone(config: PreTrainedConfig) -> Iterator[None]:
    """Say of a model that runs on no text without images that this is so.

    Raises:
        DataError: In place of what the model's forward raises for want of images.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        named = regex.search("pixel|image|vision|mm_token", str(error)) is not None
        if isinstance(error, QosoraError) or not named or not sees(config):
            raise
        raise DataError(
            f"{model_class_of(config).__name__} does not run on text without images ({first_line(error)}): give it "
            "examples with images"
        ) from error


def _loss_sum(causal: Any, examples: Sequence[Example]) -> float:
    device = causal.get_input_embeddings().weight.device
    batch = padded_batch(examples)
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    output = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    hidden = output.last_hidden_state
    targets = batch["labels"][:, 1:].to(hidden.device)
    chosen = targets != IGNORED
    hidden, targets = hidden[:, :-1][chosen], targets[chosen]
    rows, total = logits_rows(causal), 0.0
    for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        logits = logits_of_states(causal, h, type(output)).float()
        total += F.cross_entropy(logits, t.to(h.device), reduction="sum").item()
    return total


def logits_rows(causal: Any) -> int:
    """Return of how many tokens a model's logits are built at once."""
    return max(1, _LOGITS // int(causal.get_output_embeddings().weight.shape[0]))


def logits_of_states(causal: Any, hidden: torch.Tensor, output_type: Any) -> torch.Tensor:
    """Return the logits of some final hidden states, (rows, vocabulary).

    The model's own forward makes them, with a backbone that returns the given states, so that whatever it does before
    or after the output embedding (softcapping, scaling) is done.

    Args:
        causal: A language model, without an adapter around it.
        hidden: (rows, hidden_size).
        output_type: Of what its backbone returns.

    Raises:
        QosoraError: The model's own forward does not ask the backbone.
    """
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=causal.get_input_embeddings().weight.device)
    with returning(causal, output_type(last_hidden_state=hidden[None])) as calls:
        logits: torch.Tensor = causal(input_ids=ids, use_cache=False).logits[0]
    if not calls:
        raise QosoraError(f"{type(causal).__name__} makes its logits of something else than its backbone's states")
    return logits


@contextmanager
def returning(causal: Any, output: Any) -> Iterator[list[None]]:
    """Have a language model's backbone return `output` without computing anything; yield an item for each time."""
    backbone, calls = backbone_module(causal), list[None]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return output

    # OPT, and decoders of translators, call what is in it.
    modules = [m for m in (backbone, getattr(backbone, "decoder", None)) if isinstance(m, nn.Module)]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(exchanged_forward(module, forward))
        yield calls


def _answers(records: Records) -> list[tuple[Prompt, str]]:
    """Return each record's prompt and expected answer."""
    if records.kind == "text":
        raise DataError(f"{records.name}: exact match needs prompts, but the data is plain text")
    pairs = []
    for number, row in enumerate(records.rows, 1):
        messages = row.get("messages")
        prompt, answer = (messages[:-1], messages[-1:]) if messages else (row["prompt"], row["completion"])
        expected = answer if isinstance(answer, str) else text_of(answer[0].get("content"))
        if not prompt or (messages and messages[-1]["role"] != "assistant"):
            raise DataError(f"{records.name} example {number}: exact match needs a chat that ends with the assistant")
        if not isinstance(expected, str):
            raise DataError(
                f"{records.name} example {number}: exact match compares texts, and the last message has none (a call "
                "of a tool?); leave such examples out, or exact match"
            )
        pairs.append((prompt, expected))
    return pairs


def _compiled(pattern: str | None) -> regex.Pattern[str] | None:
    try:
        return None if pattern is None else regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(f"answer_pattern {pattern!r} is not a regular expression: {error}") from None


def _same(text: str, expected: str, pattern: regex.Pattern[str] | None) -> bool:
    """Compare texts, or the last matches in them; where there is no match, nothing is the same."""
    if pattern is None:
        return text.strip() == expected.strip()
    try:
        found = [list(pattern.finditer(t, timeout=_PATIENCE)) for t in (text, expected)]
    except TimeoutError:
        raise ConfigError(
            f"answer_pattern {pattern.pattern!r} takes more than {_PATIENCE:g} s on a text of {len(text)} letters; "
            "write it without a repetition of what holds one itself"
        ) from None
    if not all(found):
        return False
    a, b = ((matches[-1].group(1 if pattern.groups else 0) or "").strip() for matches in found)
    return bool(a == b)

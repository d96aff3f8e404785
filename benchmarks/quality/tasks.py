"""What is learned: the model and the examples of a task, and how it is judged.

    gsm8k        Gemma 3 270M; the answers' loss, and exact match of the number
    openbookqa   Gemma 3 270M; the answers' loss, and accuracy by the likelihood of each choice
    demo         the model that comes with qosora; the tickets' loss, and exact match

Of both data sets the first examples of at most 128 tokens are taken, and the vocabulary is cut to theirs (see
vocabulary.py), for a CPU's sake. What is forgotten is the rise of the loss on texts of another kind: questions of the
other data set, and for the demo the documents that its model was trained on.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from demo_world import pretraining_documents  # noqa: E402
from gsm8k import load_source  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402
from vocabulary import cut_model, cut_tokenizer  # noqa: E402

from qosora.base import load_tokenizer  # noqa: E402
from qosora.data import Example, load_records, tokenize  # noqa: E402
from qosora.demo import assets  # noqa: E402
from qosora.inference import evaluate, mean_loss  # noqa: E402

__all__ = ["TASKS", "Row", "Task", "prepare"]

LENGTH = 128
TRAIN, VALIDATION, TEST, OTHER = 2000, 64, 128, 64
_CHOICES = tuple(f"answer{i}" for i in range(1, 5))

Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: Of the task.
        model: Folder of the 16-bit model.
        splits: Rows with prompt and completion: "train", "validation" and "test".
        other: Texts of another kind.
        score: What besides the loss is measured on rows.
        batch_size: Examples in a step.
        search_steps: Of a training that finds the learning rate.
        steps: Of a training that counts.
    """

    name: str
    model: Path
    splits: dict[str, list[Row]]
    other: list[str]
    score: Callable[[Task, Any, Sequence[Row]], dict[str, float]]
    batch_size: int
    search_steps: int
    steps: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return _tokenizer(self.model)

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of a split, with their completions supervised."""
        return tokenize(load_records(self.splits[split]), self.tokenizer).examples

    def order(self, seed: int, steps: int) -> list[list[int]]:
        """Which training examples are in each step: the same for all methods."""
        count, drawn = len(self.splits["train"]), random.Random(seed)
        epochs = -(-steps * self.batch_size // count)
        flat = [i for _ in range(epochs) for i in drawn.sample(range(count), count)]
        return [flat[i * self.batch_size : (i + 1) * self.batch_size] for i in range(steps)]

    def loss(self, model: Any, split: str) -> float:
        """The mean loss of a split's completions."""
        return mean_loss(model, self.examples(split))

    def other_loss(self, model: Any) -> float:
        """The mean loss on texts of another kind, all tokens supervised."""
        rows = [{"text": text} for text in self.other]
        return mean_loss(model, tokenize(load_records(rows), self.tokenizer, max_length=LENGTH).examples)


@cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def prepare(names: Sequence[str], gguf: Path | None, data: Path | None, work: Path) -> dict[str, Task]:
    """Return tasks by name; make their models where they are not there yet.

    Args:
        names: Of the tasks.
        gguf: GGUF file or folder of Gemma 3 270M; not needed for the demo.
        data: Folder with `gsm8k/` and `openbookqa/`; not needed for the demo.
        work: Folder for models.
    """
    found = {}
    for name in names:
        if name != "demo" and (gguf is None or data is None):
            raise SystemExit(f"{name} needs --model and --data-dir")
        found[name] = TASKS[name](gguf, data, work)
    return found


def _demo(gguf: Any, data: Any, work: Path) -> Task:
    with assets() as source:
        if not (model := work / "demo-model").exists():
            shutil.copytree(source / "model", model)
        train, test = (_lines(source / f"{split}.jsonl") for split in ("train", "test"))
    splits = {"train": train[:-VALIDATION], "validation": train[-VALIDATION:], "test": test}
    return Task("demo", model, splits, pretraining_documents(OTHER, 7), _exact(r"(?s)(.+)", 14), 16, 40, 40)


def _gsm8k(gguf: Path, data: Path, work: Path) -> Task:
    model, splits = _gemma(gguf, data, work)
    other = [row["prompt"] for row in splits["openbookqa"]["test"][:OTHER]]
    return Task("gsm8k", model, splits["gsm8k"], other, _exact(r"#### (.+)", 96), 4, 100, 300)


def _openbookqa(gguf: Path, data: Path, work: Path) -> Task:
    model, splits = _gemma(gguf, data, work)
    other = [row["prompt"] for row in splits["gsm8k"]["test"][:OTHER]]
    return Task("openbookqa", model, splits["openbookqa"], other, _likeliest_choice, 4, 100, 300)


#: How each task is made of the GGUF file, the folder with the data, and the one for models.
TASKS: dict[str, Callable[..., Task]] = {"demo": _demo, "gsm8k": _gsm8k, "openbookqa": _openbookqa}


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _gsm8k_rows(data: Path, split: str) -> list[Row]:
    rows = _lines(data / "gsm8k" / f"{split}.jsonl")
    return [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in rows]


def _openbookqa_rows(data: Path, split: str) -> list[Row]:
    rows = json.loads((data / "openbookqa" / f"{split}.json").read_text(encoding="utf-8"))
    return [{"prompt": f"{row['instruction']}\n", "completion": row["output"]} for row in rows]


def _gemma(gguf: Path, data: Path, work: Path) -> tuple[Path, dict[str, dict[str, list[Row]]]]:
    """Return the folder of the model with its vocabulary cut, in bfloat16, and the splits of both data sets."""
    folder, file = work / "gemma", work / "gemma-splits.json"
    if not folder.exists():
        tokenizer, model = load_source(gguf)
        splits = {
            "gsm8k": _short(tokenizer, *(_gsm8k_rows(data, split) for split in ("train", "test"))),
            "openbookqa": _short(tokenizer, *(_openbookqa_rows(data, split) for split in ("train", "test"))),
        }
        rows = [row for of_task in splits.values() for of_split in of_task.values() for row in of_split]
        tokenizer, kept = cut_tokenizer(tokenizer, [row["prompt"] + row["completion"] for row in rows])
        cut_model(model, kept)
        file.write_text(json.dumps(splits), encoding="utf-8")
        made = work / "gemma.partial"
        model.to(torch.bfloat16).save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)
    return folder, json.loads(file.read_text(encoding="utf-8"))


def _short(tokenizer: PreTrainedTokenizerBase, train: list[Row], test: list[Row]) -> dict[str, list[Row]]:
    """Return the splits, of rows that are short enough."""

    def short(rows: list[Row]) -> list[Row]:
        texts = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
        return [row for row, ids in zip(rows, texts, strict=True) if len(ids) < LENGTH]

    train = short(train)[: TRAIN + VALIDATION]
    return {"train": train[:-VALIDATION], "validation": train[-VALIDATION:], "test": short(test)[:TEST]}


def _exact(pattern: str, tokens: int) -> Callable[[Task, Any, Sequence[Row]], dict[str, float]]:
    def score(task: Task, model: Any, rows: Sequence[Row]) -> dict[str, float]:
        found = evaluate(
            model, task.tokenizer, list(rows), exact_match=True, answer_pattern=pattern, max_new_tokens=tokens,
            batch_size=32,
        )  # fmt: skip
        assert found.exact_match is not None
        return {"exact_match": found.exact_match}

    return score


def _likeliest_choice(task: Task, model: Any, rows: Sequence[Row]) -> dict[str, float]:
    """How often the right choice is the likeliest of the four."""
    right = 0
    for row in rows:
        expected = next(c for c in _CHOICES if row["completion"].endswith(c))
        stem = row["completion"].removesuffix(expected)
        losses = {}
        for choice in _CHOICES:
            records = load_records([{"prompt": row["prompt"], "completion": stem + choice}])
            losses[choice] = mean_loss(model, tokenize(records, task.tokenizer).examples)
        right += min(losses, key=lambda choice: losses[choice]) == expected
    return {"accuracy": right / len(rows)}

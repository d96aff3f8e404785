"""Texts and words with classes, as tokens and batches."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import make_bert
from tiny import write_jsonl
from transformers import AutoTokenizer

from qosora.data import Columns, class_batch, load_records, tokenize_classes
from qosora.errors import DataError

CLASSES = {"cold": 0, "warm": 1}
TAGS = {"O": 0, "B-LOC": 1, "I-LOC": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_bert(tmp_path_factory.mktemp("bert")))


def tokens(*args: Any, **options: Any) -> Any:
    return tokenize_classes(*args, **options)


def texts(rows: list[dict[str, Any]], **columns: str) -> Any:
    return load_records(rows, form="classes", columns=Columns(**columns))


def words(rows: list[dict[str, Any]]) -> Any:
    return load_records(rows, form="tags")


def test_texts_have_the_tokenizers_special_tokens(tokenizer: Any):
    rows: list[dict[str, Any]] = [
        {"text": "ab", "label": "warm"},
        {"text": "c", "label": 0},
        {"text": "d", "label": "1"},
    ]
    found = tokens(texts(rows), tokenizer, CLASSES)
    assert [e.input_ids.tolist() for e in found.examples] == [tokenizer(row["text"])["input_ids"] for row in rows]
    assert [e.labels.tolist() for e in found.examples] == [[1], [0], [1]]
    assert (found.tokens, found.supervised, found.cut, found.dropped) == (10, 3, 0, 0)


def test_columns_by_name(tokenizer: Any):
    records = texts([{"review": "ab", "stars": 1, "label": "x"}], text="review", label="stars")
    assert tokens(records, tokenizer, CLASSES).examples[0].labels.tolist() == [1]


def test_two_texts_have_segments(tokenizer: Any):
    rows = [{"text": "ab", "text_pair": "c", "label": "warm"}]
    (example,) = tokens(texts(rows), tokenizer, CLASSES).examples
    assert example.segments is not None
    assert example.segments.tolist() == [0, 0, 0, 0, 1, 1]
    assert class_batch([example], 257)["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_the_first_token_of_a_word_has_its_class(tokenizer: Any):
    rows: list[dict[str, Any]] = [{"tokens": ["go", "RIO"], "tags": ["O", "B-LOC"]}, {"tokens": ["to"], "tags": [0]}]
    found = tokens(words(rows), tokenizer, TAGS)
    assert found.examples[0].labels.tolist() == [-100, 0, -100, 1, -100, -100, -100]
    assert found.supervised == 3
    batch = class_batch(found.examples, 257)
    assert batch["labels"].tolist()[1] == [-100, 0, -100, -100, -100, -100, -100]
    assert batch["input_ids"][1, 4:].tolist() == [257, 257, 257]
    assert batch["attention_mask"].sum(1).tolist() == [7, 4]


def test_one_word_of_one_token_is_still_words(tokenizer: Any):
    (example,) = tokens(words([{"tokens": ["a"], "tags": ["O"]}]), tokenizer, TAGS).examples
    assert class_batch([example], 0)["labels"].shape == (1, 3)
    (text,) = tokens(texts([{"text": "a", "label": 0}]), tokenizer, CLASSES).examples
    assert class_batch([text], 0)["labels"].shape == (1,)
    assert class_batch([text], 0)["labels"].dtype == torch.int64


def test_long_texts_keep_their_end_token(tokenizer: Any, caplog: pytest.LogCaptureFixture):
    rows = [{"text": "abcdef", "label": 0}, {"text": "a", "label": 1}]
    with caplog.at_level(logging.WARNING, "qosora"):
        found = tokens(texts(rows), tokenizer, CLASSES, max_length=4)
    assert found.examples[0].input_ids.tolist() == [256, *tokenizer("ab")["input_ids"][1:3], 257]
    assert found.cut == 1
    assert "cuts 1 of 2 examples" in caplog.text
    assert "longest has 8 tokens" in caplog.text


def test_no_text_is_longer_than_the_tokenizer_says(tokenizer: Any):
    short = AutoTokenizer.from_pretrained(tokenizer.name_or_path, model_max_length=5)
    found = tokens(texts([{"text": "abcdef", "label": 0}]), short, CLASSES, max_length=100)
    assert len(found.examples[0].input_ids) == 5


def test_words_beyond_the_limit_are_counted_as_lost(tokenizer: Any):
    rows = [{"tokens": ["ab", "cd", "ef"], "tags": ["O", "O", "O"]}]
    found = tokens(words(rows), tokenizer, TAGS, max_length=6)
    assert (found.supervised, found.lost) == (2, 1)
    with pytest.raises(DataError, match="none of the 1 examples has a class left at 2 tokens"):
        tokens(words(rows), tokenizer, TAGS, max_length=2)


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("classes", {"text": "a", "label": None}, "line 2: label is None; it must be the name or number of a class"),
        ("classes", {"text": "a", "label": 0.5}, "label is 0.5"),
        ("classes", {"text": "", "label": 0}, "text is empty"),
        ("classes", {"text": "a", "label": "hot"}, "example 2: the class 'hot' is none of the model's: cold, warm"),
        ("classes", {"text": "a", "label": 2}, "the class 2 is none"),
        ("classes", {"text": "a", "label": -1}, "the class -1 is none"),
        ("tags", {"tokens": "a b", "tags": [0, 0]}, "tokens must be a list of words"),
        ("tags", {"tokens": ["a"], "tags": ["O", "O"]}, "example 2: 1 words and 2 tags"),
        ("tags", {"tokens": ["a"], "tags": []}, r"tags is \[\]; it must be the name or number of a class for each"),
        ("tags", {"tokens": ["a"], "tags": 0}, "line 2: tags is 0"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    tokenizer: Any, tmp_path: Path, form: str, row: dict[str, Any], message: str
):
    good = {"text": "a", "label": 0, "tokens": ["a"], "tags": ["O"]}
    good = {key: value for key, value in good.items() if key in row}
    path = write_jsonl(tmp_path / "data.jsonl", [good, row])
    with pytest.raises(DataError, match=message):
        tokens(load_records(path, form=form), tokenizer, CLASSES if form == "classes" else TAGS)


def test_without_classes_the_columns_are_named():
    with pytest.raises(DataError, match="text_column and label_column"):
        load_records([{"sentence": "a", "label": 0}], form="classes")

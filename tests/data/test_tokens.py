"""Tokens and labels: equal to TRL's, counted, cut with a warning, and refused where nothing is left."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from tiny import make_tokenizer, sums
from trl import SFTConfig, SFTTrainer

from qosora.data.records import load_records, no_progress_bars
from qosora.data.tokens import IGNORED, Tokenized, tokenize
from qosora.errors import DataError

BOS, EOS = 256, 257
USER, HELLO, BYE = (
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
)


def tokenized(rows: list[dict[str, Any]], **options: Any) -> Tokenized:
    return tokenize(load_records(rows), make_tokenizer(), **options)


def as_lists(data: Tokenized) -> list[dict[str, list[int]]]:
    return [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in data.examples]


def supervised_text(data: Tokenized, index: int = 0) -> str:
    labels = data.examples[index].labels
    return make_tokenizer().decode(labels[labels != IGNORED])


@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize(
    "rows",
    [
        [*sums(5), {"prompt": "a", "completion": "b</s>"}, {"prompt": "grün", "completion": "ü"}],
        [{"text": "once upon a time"}, {"text": "ends</s>"}],
        [{"prompt": [USER], "completion": [HELLO]}],
    ],
)
def test_as_trl_would(rows: list[dict[str, Any]], max_length: int | None):
    trainer = SimpleNamespace(_tokenizer=make_tokenizer(), completion_only_loss="prompt" in rows[0], chat_template=None)
    args = SFTConfig(output_dir="unused", max_length=max_length, use_cpu=True, activation_checkpointing=False)
    with no_progress_bars():
        theirs = SFTTrainer._prepare_dataset(
            trainer, datasets.Dataset.from_list(rows), make_tokenizer(), args, False, None, "train"
        )
    expected = [{key: row[key] for key in ("input_ids", "labels")} for row in theirs]
    if not expected:  # TRL trains on nothing then
        with pytest.raises(DataError):
            tokenized(rows, max_length=max_length)
    else:
        assert as_lists(tokenized(rows, max_length=max_length)) == expected


def test_prompt_and_completion():
    data = tokenized([{"prompt": "ab", "completion": "c"}])
    (example,) = data.examples
    assert example.input_ids[0] == BOS
    assert example.labels.tolist() == [IGNORED, IGNORED, IGNORED, *example.input_ids[3:]]
    assert supervised_text(data) == "c</s>"
    assert (data.tokens, data.supervised, data.lost, data.cut, data.dropped) == (5, 2, 0, 0, 0)
    everything = tokenized([{"prompt": "ab", "completion": "c"}], completion_only=False)
    assert everything.examples[0].labels.tolist() == example.input_ids.tolist()
    assert everything.supervised == 4  # nothing comes before the first


def test_chats_train_on_all_turns_of_the_assistant():
    data = tokenized([{"messages": [USER, HELLO, BYE, {"role": "assistant", "content": "ciao"}]}])
    assert supervised_text(data) == "hi</s>ciao</s>"
    assert data.examples[0].input_ids[0] == BOS
    assert (data.examples[0].input_ids == BOS).sum() == 1
    assert data.supervised == data.tokens - 1 - len("<user>hello") - 1 - len("<assistant><user>bye") - 1 - 11
    whole = tokenized([{"messages": [USER, HELLO]}], completion_only=False)
    assert whole.supervised == whole.tokens - 1


def test_a_first_turn_of_the_assistant():
    assert supervised_text(tokenized([{"messages": [HELLO, USER]}])) == "hi</s>"


def test_columns_for_a_data_set():
    columns = tokenized(sums(3)).columns()
    rows = datasets.Dataset.from_dict(columns)[0]
    assert rows["input_ids"] == columns["input_ids"][0].tolist()


def test_truncation_is_counted_and_told(caplog: pytest.LogCaptureFixture):
    rows = [
        {"prompt": "ab", "completion": "c"},  # 5 tokens, 2 of them supervised
        {"prompt": "ab", "completion": "cdefgh"},  # 10, 7: three are left
        {"prompt": "abcdefgh", "completion": "c"},  # 11, 2: none
    ]
    with caplog.at_level(logging.WARNING, "qosora"):
        data = tokenized(rows, max_length=6)
    assert (len(data), data.supervised, data.lost, data.cut, data.dropped) == (2, 5, 6, 2, 1)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the data: 6 of 11 supervised tokens (54.5 %) are lost, as max_length=6 cuts 2 of 3 examples; 1 examples are "
        "left out, having none. The longest example has 11 tokens"
    )


def test_images_that_are_left_out_are_told(caplog: pytest.LogCaptureFixture):
    row: dict[str, Any] = {"prompt": "a", "completion": "b"}
    rows = [{**row, "image": "x.png"}, {**row, "image": None}]
    with caplog.at_level(logging.WARNING, "qosora"):
        assert len(tokenize(load_records(rows), make_tokenizer())) == 2
    assert "the images of 1 examples are left out, as text alone is read here" in caplog.text


def test_prompts_that_fill_the_length(caplog: pytest.LogCaptureFixture):
    with pytest.raises(DataError) as caught:
        tokenized([{"prompt": "abcdefgh", "completion": "c"}], max_length=9)
    assert str(caught.value) == (
        "the data: none of the 1 examples has a token to train on: the prompts alone fill max_length=9. Raise it to at "
        "least 10, for whole examples to 11, or shorten the prompts"
    )
    assert tokenized([{"prompt": "abcdefgh", "completion": "c"}], max_length=10).supervised == 1


@pytest.mark.parametrize(
    ("rows", "options", "chat", "expected"),
    [
        ([{"messages": [USER]}], {}, True, "no message is the assistant's"),
        ([{"messages": [USER, HELLO]}], {}, False, "the tokenizer has no chat template"),
        ([{"prompt": [USER], "completion": [HELLO]}], {}, False, "the tokenizer has no chat template"),
        ([{"text": "a"}], {"completion_only": True}, True, "completion_only needs prompts or messages"),
    ],
)
def test_what_cannot_be_trained_on(rows: list[dict[str, Any]], options: dict[str, Any], chat: bool, expected: str):
    with pytest.raises(DataError, match=expected):
        tokenize(load_records(rows), make_tokenizer(chat=chat), **options)


def test_a_template_that_refuses_a_chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the data example 1: the chat template refuses it: roles must alternate"):
        tokenize(load_records([{"messages": [USER, HELLO]}]), tokenizer)


def test_a_tokenizer_without_an_end():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenize(load_records(sums(1)), tokenizer)


def test_chats_that_never_stop_are_told(caplog: pytest.LogCaptureFixture):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "\n")
    tokenize(load_records([{"messages": [USER, HELLO]}]), tokenizer)
    assert "the examples never end with a token that stops generation ([257])" in caplog.text
    caplog.clear()
    newline = tokenizer("\n")["input_ids"][-1]
    tokenize(load_records([{"messages": [USER, HELLO]}]), tokenizer, stop_ids=[newline])
    assert not caplog.records

"""What TRL is handed, and what is counted of it."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import make_tokenizer
from trl import extract_prompt

from qosora.data.prepared import prepare
from qosora.data.records import load_records
from qosora.errors import DataError

PAIRS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "13"},
    {"prompt": "2+3=", "chosen": "5", "rejected": "4"},
]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def prepared(rows: list[dict[str, Any]], form: str, **options: Any) -> Any:
    return prepare(load_records(rows, form=form), make_tokenizer(), **options)


def test_examples_are_handed_over_as_tokens():
    made = prepared([{"prompt": "1+1=", "completion": "2"}], "language")
    assert made.dataset.column_names == ["input_ids", "labels"]
    assert made.dataset[0]["input_ids"] == made.tokenized.examples[0].input_ids.tolist()
    assert made.digest() == made.tokenized.digest()


def test_preferences_are_counted_on_both_sides():
    made = prepared(PAIRS, "preference")
    assert made.dataset.to_list() == PAIRS
    assert len(made) == 2
    tokenizer = make_tokenizer()
    texts = [tokenizer.decode(e.input_ids, skip_special_tokens=True) for e in made.tokenized.examples]
    assert texts == ["1+1=2", "2+3=5", "1+1=13", "2+3=4"]
    assert made.tokenized.supervised == sum(len(t) for t in ("2", "5", "13", "4")) + 4


def test_labels_come_from_preferences_in_the_order_of_trl():
    made = prepared(PAIRS, "labeled")
    assert made.dataset["completion"][:] == ["2", "5", "13", "4"]
    assert made.dataset["label"][:] == [True, True, False, False]
    assert len(made.tokenized) == 4


def test_labels_as_they_come():
    rows = [{"prompt": "1+1=", "completion": "2", "label": label} for label in (True, 0, "False", " true", 1)]
    assert prepared(rows, "labeled").dataset["label"][:] == [True, False, False, True, True]


def test_prompts_bring_what_rewards_ask_for():
    made = prepared([{"prompt": "1+1=", "completion": "2", "points": 3}], "prompts")
    assert made.dataset.to_list() == [{"prompt": "1+1=", "answer": "2", "points": 3}]
    assert (made.tokenized.supervised, made.tokenized.tokens) == (0, len(made.tokenized.examples[0].input_ids))


def test_a_prompt_of_messages_ends_where_the_model_is_to_answer():
    made = prepared([{"prompt": asked("1+1=")}], "prompts")
    tokenizer = make_tokenizer()
    text = tokenizer.apply_chat_template(asked("1+1="), tokenize=False, add_generation_prompt=True)
    assert made.tokenized.examples[0].input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": asked("a") + said("b"), "rejected": asked("a") + said("c")},
        {"chosen": "ab c", "rejected": "ab d"},
    ],
)
def test_a_prompt_within_both_is_found_as_trl_finds_it(row: dict[str, Any]):
    assert prepared([row], "preference").dataset.to_list() == [extract_prompt(row)]


def test_tools_of_a_chat_are_handed_over_as_text():
    row = {"prompt": asked("a"), "chosen": said("b"), "rejected": said("c"), "tools": [{"name": "x"}], "id": 3}
    assert prepared([row], "preference").dataset.to_list() == [
        {"prompt": asked("a"), "chosen": said("b"), "rejected": said("c"), "tools": '[{"name": "x"}]'}
    ]


def test_the_digest_sees_what_tokens_do_not_show():
    rows = [{"prompt": "1+1=", "completion": "2", "label": True}]
    digests = {prepared([{**row, "label": label}], "labeled").digest() for row in rows for label in (True, False)}
    digests |= {prepared([{"prompt": "1+1=", "points": points}], "prompts").digest() for points in (1, 2)}
    assert len(digests) == 4


def test_values_of_several_types_are_told():
    rows: list[dict[str, Any]] = [{"prompt": "a", "points": [1]}, {"prompt": "b", "points": "x"}]
    with pytest.raises(DataError, match="the values of a column must be of one type"):
        prepared(rows, "prompts")


def test_what_is_cut_is_told(caplog: pytest.LogCaptureFixture):
    made = prepared([{"prompt": "1+1=", "chosen": "2", "rejected": "2 or 3"}], "preference", max_length=7)
    assert (made.tokenized.cut, len(made)) == (1, 1)
    assert "max_length=7 cuts 1 of 2 examples" in caplog.text

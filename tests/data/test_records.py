"""Reading data: every format gives the same records, and every mistake one line that names its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from qosora.data.records import Columns, load_records
from qosora.errors import DataError

ROWS = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "grün,\n\"x\"", "completion": " ü"}]  # fmt: skip
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def message(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_records(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str):
    records = load_records(write(tmp_path / f"a{suffix}", ROWS))
    assert records.kind == "prompt-completion"
    assert records.rows == ROWS
    assert len(load_records(tmp_path / f"a{suffix}", limit=1)) == 1


def test_a_json_object_around_the_list(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}))
    assert load_records(tmp_path / "a.json").rows == ROWS


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path):
    (tmp_path / "a.csv").write_text("prompt,completion\r\na,b\r\n", encoding="utf-8-sig")
    assert load_records(tmp_path / "a.csv").rows == [{"prompt": "a", "completion": "b"}]


def test_kinds_and_named_columns():
    assert load_records([{"messages": CHAT, "id": 3}]).rows == [{"messages": CHAT, "columns": {"id": 3}}]
    assert load_records([{"text": "a"}]).kind == "text"
    named = load_records([{"question": "q", "answer": "a"}], columns=Columns(prompt="question", completion="answer"))
    assert named.rows == [{"prompt": "q", "completion": "a"}]
    turns = load_records([{"prompt": CHAT[:1], "completion": CHAT[1:]}])
    assert turns.rows == [{"prompt": CHAT[:1], "completion": CHAT[1:]}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"text": "a"}\n{"text": "b"}\n'),
        ("a.json", '\ufeff{"text": "a"}\n\n{"text": "b"}'),
        ("a.json", '[{"text": "a"}, {"text": "b"}]'),
        ("a.json", '{"rows": [{"text": "a"}, {"text": "b"}]}'),
        ("a.jsonl", '\n [{"text": "a"},\n{"text": "b"}]'),
    ],
)
def test_json_by_what_it_is_and_not_by_its_name(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_records(tmp_path / name).rows == [{"text": "a"}, {"text": "b"}]


def test_a_single_object(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"prompt": "a", "completion": "b"}\n')
    assert load_records(tmp_path / "a.json").rows == [{"prompt": "a", "completion": "b"}]


def test_a_chat_of_prompt_and_completion():
    records = load_records([{"prompt": "hello", "completion": "hi"}], chat=True)
    assert (records.kind, records.rows) == ("messages", [{"messages": CHAT}])
    assert "chat wraps prompts and completions, but the data is text" in message([{"text": "a"}], chat=True)


def test_a_data_set_of_the_hub_library():
    assert load_records(datasets.Dataset.from_list(ROWS)).rows == ROWS


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split, datasets.is_progress_bar_enabled()))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_records("openai/gsm8k:main", split="test").rows == ROWS
    assert asked == [("openai/gsm8k", "main", "test", False)]
    assert datasets.is_progress_bar_enabled()
    assert capsys.readouterr() == ("", "")


def test_a_hub_data_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch):
    def load(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert message("org/name") == "org/name: no such file, and no hub data set that can be loaded (no network)"


def test_a_missing_file_is_not_looked_for_on_the_hub():
    assert message("train.jsonl") == "train.jsonl: no such file"
    assert message("./data") == "./data: no such file"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_an_empty_file(tmp_path: Path, suffix: str):
    (tmp_path / f"a{suffix}").write_text("")
    assert message(tmp_path / f"a{suffix}") == f"{tmp_path}/a{suffix} is empty: it has no example"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text":\n', "a.jsonl line 3: broken JSON (Expecting value at column 9)"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "a.jsonl line 2: expected a JSON object, got a list"),
        ("a.json", '[{"text": "a"},\n {"text"}]', "a.json: broken JSON (Expecting ':' delimiter at line 2 column 9)"),
        ("a.json", '[{"text": "a"}, 3]', "a.json row 2: expected a JSON object, got a number"),
        ("a.json", '"text"', "a.json: expected a JSON list of objects, got text"),
        ("a.jsonl", '{"text": "a\\ud83d"}', "a.jsonl line 1: text has \\ud83d at character 1, which is half of a"),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv line 3: not the 2 fields that the header names"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv line 2: not the 2 fields that the header names"),
        ("a.csv", 'text\n"a', "a.csv line 2: broken CSV (unexpected end of data)"),
        ("a.parquet", "nothing", "a.parquet is no Parquet file"),
        ("a.txt", "x", "a.txt is a file of unknown kind '.txt'; name a file that ends in .jsonl, .json, .csv"),
    ],
)
def test_a_broken_file(tmp_path: Path, name: str, text: str, expected: str):
    (tmp_path / name).write_text(text)
    assert message(tmp_path / name).startswith(f"{tmp_path}/{expected}")


def test_a_file_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "grün"}'.encode("latin-1"))
    assert "is not UTF-8 text" in message(tmp_path / "a.jsonl")


def test_a_folder(tmp_path: Path):
    assert "is a folder; name a file" in message(tmp_path)


def test_a_split_of_a_file(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert "split 'test' is for hub data sets" in message(path, split="test")


def test_missing_columns_are_told_with_those_there_are(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    assert message(path).startswith(
        f"{path} has none of the columns prompt and completion, messages, text; its columns"
    )
    assert "are question, answer. Say which to use with prompt_column and completion_column" in message(path)
    columns = Columns(prompt="question", completion="reply")
    assert message(path, columns=columns) == f"{path} has no column 'reply'; its columns are question, answer"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, "no 'completion', which other rows have"),
        ({"prompt": "a", "completion": None}, "completion is null; it must be text"),
        ({"prompt": " ", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": 3}, "completion is a number; it must be text"),
        ({"prompt": "a", "completion": CHAT}, "prompt and completion must both be text or both be messages"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], expected: str):
    path = write(tmp_path / "a.jsonl", [*ROWS, row])
    assert message(path) == f"{path} line 3: {expected}"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "messages is text; it must be a list of messages"),
        ([], "messages is an empty list of messages"),
        ([{"content": "a"}], "messages has no role in message 1"),
        ([*CHAT, {"role": "user", "content": None}], "messages has no text as content in message 3 (user)"),
    ],
)
def test_bad_messages(messages: Any, expected: str):
    assert message([{"messages": messages}]).startswith(f"the data row 1: {expected}")


# ---- what is compared, judged or rewarded


@pytest.mark.parametrize(
    ("rows", "form", "expected"),
    [
        ([{"prompt": "a", "chosen": "b"}], "preference", "none of the columns prompt, chosen and rejected, chosen and"),
        ([{"chosen": "b", "rejected": "c"}], "language", "Learn from chosen and rejected with method dpo, orpo or kto"),
        ([{"prompt": "a", "chosen": "b", "rejected": CHAT}], "preference", "must all be text or all be messages"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "preference", "chosen and rejected are the same in all 1"),
        (
            [{"chosen": "b", "rejected": "c"}],
            "preference",
            "which leaves prompt empty; give a column prompt",
        ),
        ([{"chosen": "ab", "rejected": "a"}], "preference", "empty; give a column prompt"),
        ([{"prompt": "a", "completion": "b", "label": "good"}], "labeled", "label is 'good'; it must be true or false"),
        ([{"question": "a"}], "prompts", "none of the columns prompt; its columns are question. Say which to use with"),
    ],
)
def test_what_cannot_be_compared_is_told(rows: list[dict[str, Any]], form: str, expected: str):
    assert expected in message(rows, form=form)


def test_pairs_that_prefer_nothing_are_left_out_and_told(caplog: pytest.LogCaptureFixture):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert load_records(rows, form="preference").rows == rows[1:]
    assert "1 of 2 examples are left out, as chosen and rejected are the same in them" in caplog.text


def test_chats_of_what_is_compared():
    asked, said = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    pair = load_records([{"prompt": "a", "chosen": "b", "rejected": "c"}], form="preference", chat=True)
    assert pair.rows == [{"prompt": asked, "chosen": said, "rejected": [{"role": "assistant", "content": "c"}]}]
    prompts = load_records([{"question": "a", "n": 1}], form="prompts", chat=True, columns=Columns(prompt="question"))
    assert prompts.rows == [{"prompt": asked, "columns": {"n": 1}}]
    labeled = load_records([{"prompt": "a", "completion": "b", "label": 0}], form="labeled", chat=True)
    assert labeled.rows == [{"prompt": asked, "completion": said, "label": False}]

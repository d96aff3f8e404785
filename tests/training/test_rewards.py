"""What answers are worth, and what is said of rewards that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qosora.errors import ConfigError, DataError
from qosora.training.rewards import load_rewards, reward_digests

FILE = """
import beside

def short(completions, answer):
    return [-len(c) - beside.ONE for c in completions]

def everything(prompts, completions, completion_ids, **columns):
    return [len(columns["answer"])] * len(prompts)

def few(completions, **_):
    return [1.0]

def words(completions, **_):
    return ["good"] * len(completions)

def failing(completions, **_):
    return [1 / 0 for _ in completions]

def demanding(completions, points):
    return points

value = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("ONE = 1\n")
    (tmp_path / "rewards.py").write_text(FILE)
    return tmp_path / "rewards.py"


def worth(name: str, completions: list[Any], **columns: list[Any]) -> Any:
    [reward] = load_rewards([name], columns)
    given = {"prompts": ["?"] * len(completions), "completion_ids": [[0]] * len(completions)}
    return reward(completions=completions, **given, **columns)


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("exact", " 7 apples\n", "7 apples", 1),
        ("exact", "7", "7 apples", 0),
        ("exact", [{"role": "assistant", "content": "7"}], "7", 1),
        ("number", "so 1,234 + 1 = 1,235.", "long way\n#### 1235", 1),
        ("number", "1235.0", "1235", 1),
        ("number", "-5", "5", 0),
        ("number", "no idea", "5", 0),
        ("number", "no idea", "none", 0),
        ("number", "5", 5, 1),
        (r"regex:^\s*\d+$", " 12", "", 1),
        (r"regex:^\s*\d+$", "12 a", "", 0),
        ("think", "<think>\nso\n</think>\n3", "", 1),
        ("think", "3", "", 0),
    ],
)
def test_those_that_come_along(name: str, completion: Any, answer: Any, expected: float):
    assert worth(name, [completion], answer=[answer]) == [expected]


def test_another_column_than_answer():
    assert worth("exact:solution", ["a", "b"], solution=["a", "a"]) == [1, 0]


def test_from_a_file(file: Path):
    assert worth(f"{file}:short", ["abc", ""], answer=[1, 2], other=[1, 2]) == [-4, -1]
    assert worth(f"{file}:everything", ["abc", ""], answer=[1, 2]) == [2, 2]
    assert [r.__name__ for r in load_rewards([f"{file}:short", "exact"], ["answer"])] == ["short", "exact"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exakt", "there is no reward 'exakt'; did you mean 'exact'?"),
        ("exact", "compares with the column 'answer', and the data has points, prompt"),
        ("regex:(", r"'\(' is no regular expression"),
        ("none.py:f", "there is no file none.py"),
        ("{file}:missing", "has no function missing"),
        ("{file}:value", "has no function value"),
        ("{file}:short", "takes 'answer', which is no column of the data; there are completion_ids, completions, "),
    ],
)
def test_what_cannot_be_used_is_told_at_once(file: Path, name: str, expected: str):
    with pytest.raises(ConfigError, match=expected):
        load_rewards([name.format(file=file)], ["prompt", "points"])


def test_a_file_that_cannot_be_run(tmp_path: Path):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match=r"bad.py cannot be run \(ModuleNotFoundError: "):
        load_rewards([f"{tmp_path}/bad.py:f"], [])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("few", "returned 1 values for 2 completions"),
        ("words", "must return numbers or None, got 'good'"),
        ("failing", r"failed in .*rewards.py line 17: ZeroDivisionError: division by zero"),
    ],
)
def test_what_goes_wrong_is_told_with_its_place(file: Path, function: str, expected: str):
    with pytest.raises(DataError, match=expected):
        worth(f"{file}:{function}", ["a", "b"])


def test_the_file_counts_and_not_its_name(file: Path):
    names = [f"{file}:short", "exact"]
    before = reward_digests(names)
    file.write_text(FILE + "\n")
    assert list(before) == [f"the rewards in {file}"]
    assert reward_digests(names) != before

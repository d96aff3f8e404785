"""What an answer is worth: functions that come along, or from a file that the user names.

A reward is called as TRL calls it: with lists of prompts and completions and of every other column of the data, and
returns a number for each completion, or None for no opinion. What goes wrong in it is told in one line.
"""

from __future__ import annotations

import inspect
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from trl.rewards import think_format_reward

from qosora.checkpoints import file_digest
from qosora.errors import ConfigError, DataError, first_line, near_miss

__all__ = ["load_rewards", "reward_digests"]

Reward = Callable[..., Any]
_FILE = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
#: What TRL hands to a reward besides the columns of the data.
_GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def load_rewards(names: Sequence[str], columns: Collection[str]) -> list[Reward]:
    """Return the functions that are named.

    Args:
        names: FILE.py:FUNCTION, or "exact", "number", "regex:PATTERN", "think"; the first two compare with the column
            "answer", or with another after a colon.
        columns: Of the data.

    Raises:
        ConfigError: There is no such reward, or it needs what the data does not have.
    """
    return [_load(name, set(columns)) for name in names]


def reward_digests(names: Sequence[str]) -> dict[str, str]:
    """Return the hash of each file that rewards are from, by what a message calls it."""
    files = [match["file"] for name in names if (match := _FILE.fullmatch(name))]
    return {f"the rewards in {file}": file_digest(Path(file).expanduser()) for file in files}


def _load(name: str, columns: set[str]) -> Reward:
    if match := _FILE.fullmatch(name):
        return _from_file(name, Path(match["file"]).expanduser(), match["function"], columns)
    kind, _, argument = name.partition(":")
    if kind in ("exact", "number"):
        column = argument or "answer"
        if column not in columns:
            raise ConfigError(
                f"reward {name} compares with the column {column!r}, and the data has {', '.join(sorted(columns))}; "
                f"name another like this: {kind}:COLUMN"
            )
        return _named(name, _comparison(_stripped if kind == "exact" else _last_number, column))
    if kind == "regex":
        try:
            pattern = re.compile(argument, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"reward {name}: {argument!r} is no regular expression ({error})") from None
        return _named("regex", lambda completions, **_: [float(bool(pattern.search(_text(c)))) for c in completions])
    if name == "think":
        return _named("think", lambda completions, **_: think_format_reward(_as_messages(completions)))
    known = ("exact", "number", "regex", "think")
    raise ConfigError(
        f"there is no reward {name!r}{near_miss(kind, known)}: name FILE.py:FUNCTION, or one of {', '.join(known)}"
    )


def _named(name: str, function: Reward) -> Reward:
    function.__name__ = name  # by which TRL logs it
    return function


def _text(completion: Any) -> str:
    """Return what was answered: text, or the content of a chat's last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"] or "")


def _as_messages(completions: Sequence[Any]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": _text(completion)}] for completion in completions]


def _stripped(text: str) -> str:
    return text.strip()


def _last_number(text: str) -> float | None:
    """Return the last number of a text, without the commas of its thousands."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _comparison(of: Callable[[str], Any], column: str) -> Reward:
    def reward(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        pairs = zip(completions, columns[column], strict=True)
        return [float((wanted := of(str(answer))) is not None and of(_text(c)) == wanted) for c, answer in pairs]

    return reward


def _from_file(name: str, file: Path, function: str, columns: set[str]) -> Reward:
    if not file.is_file():
        raise ConfigError(f"reward {name}: there is no file {file}")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # for what the file imports from beside it
    try:
        found = runpy.run_path(str(file)).get(function)
    except Exception as error:
        raise ConfigError(
            f"reward {name}: {file} cannot be run ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not callable(found):
        raise ConfigError(f"reward {name}: {file} has no function {function}")
    parameters = inspect.signature(found).parameters
    for parameter in parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL,
        )  # fmt: skip
        if needed and parameter.name not in columns | _GIVEN:
            raise ConfigError(
                f"reward {name} takes {parameter.name!r}, which is no column of the data; there are "
                f"{', '.join(sorted(columns | _GIVEN))}"
            )
    if inspect.iscoroutinefunction(found):
        return found  # which TRL awaits
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return _watched(name, found, function, None if everything else set(parameters))


def _watched(name: str, reward: Reward, called: str, taken: set[str] | None) -> Reward:
    """Return a reward that says what is wrong with it, and is given what it takes."""

    def watched(**given: Any) -> list[float | None]:
        count = len(given["completions"])
        try:
            values = list(reward(**{k: v for k, v in given.items() if taken is None or k in taken}))
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"reward {name} failed in {line.filename} line {line.lineno}: {said}") from error
        if len(values) != count:
            raise DataError(f"reward {name} returned {len(values)} values for {count} completions")
        for value in values:
            if value is not None and not isinstance(value, Real):
                raise DataError(f"reward {name} must return numbers or None, got {value!r}")
        return values

    return _named(called, watched)

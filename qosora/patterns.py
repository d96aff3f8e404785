"""Names of modules by regular expressions, some of which come from files of others: none that could take for ever."""

from __future__ import annotations

import re

__all__ = ["matches_module", "pattern_problem"]

#: Unbounded repetitions in one expression: the time to match a name grows with its length to this power.
_MOST = 5
_QUANTIFIER = re.compile(r"([*+?]|\{\d*,?\d*\})[?+]?")
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")


def matches_module(pattern: str, module_name: str) -> bool:
    """Say whether a pattern means a module: it is its name, an end of that, or a regular expression for either."""
    return re.match(rf"(.*\.)?({pattern})$", module_name) is not None


def pattern_problem(pattern: object) -> str | None:
    """Return why a value cannot be used as a pattern, or None.

    A repetition of what holds a repetition itself, or alternatives, may take for ever on a name of fifty letters, and
    it is PEFT and Python's own `re` that match it.
    """
    if not isinstance(pattern, str):
        return "is not a name"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression: {error}"
    if _nested(pattern):
        return "could take for ever: it repeats a group that holds a repetition or alternatives; write it without"
    return None


def _nested(pattern: str) -> bool:
    """Say whether a group that varies in itself is repeated without bound, or too much is."""
    groups, unbounded, at = [False], 0, 0  # of each open group, whether it varies
    closed: bool | None = None  # of the item before a quantifier, if that is a group: whether it varies
    while at < len(pattern):
        letter = pattern[at]
        quantifier = _QUANTIFIER.match(pattern, at) if at else None
        if letter == "(" and pattern.startswith("(?", at):  # the question mark repeats nothing
            groups.append(False)
            closed, at = None, at + 2
        elif quantifier is not None and quantifier[0] != "{}":
            endless = _UNBOUNDED.match(quantifier[1]) is not None
            unbounded += endless
            if (endless and closed) or unbounded > _MOST:
                return True
            groups[-1] = groups[-1] or quantifier[1] not in ("?",) or bool(closed)
            closed, at = None, quantifier.end()
        elif letter == "(":
            groups.append(False)
            closed, at = None, at + 1
        elif letter == ")":
            closed = groups.pop() if len(groups) > 1 else None
            groups[-1] = groups[-1] or bool(closed)
            at += 1
        elif letter == "[":
            at = _end_of_set(pattern, at)
            closed = None
        else:
            groups[-1] = groups[-1] or letter == "|"
            closed, at = None, at + (2 if letter == "\\" else 1)
    return False


def _end_of_set(pattern: str, at: int) -> int:
    """Return where the set ends that begins at a bracket."""
    at += 2 if pattern.startswith("[^", at) else 1
    at += pattern.startswith("]", at)  # the first one is a letter
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1

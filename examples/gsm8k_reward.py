r"""A reward of your own: are the sums right that an answer in GSM8K's style spells out, as in <<48/2=24>>?

    qosora train --method grpo --model my-base --data train.jsonl --output-dir my-adapter \
        --reward number --reward examples/gsm8k_reward.py:sums

A reward gets lists, one entry for each answer: of completions, of prompts, and of every other column of the data. It
returns a number for each. The last number of an answer is right too seldom for a small model to learn from it alone;
this one is worth something for each step on the way. What it does not ask for is not learned: with sums alone, of
whatever numbers, a model soon writes `<<2*2=4>>` and nothing else. So the numbers must be the question's or results of
sums before, and the last result must be the answer.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from typing import Any

_SUM = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_FINAL = re.compile(r"#### (-?\d+(?:\.\d+)?)\s*$")
_WORDS = {
    "half": 2, "twice": 2, "double": 2, "two": 2, "three": 3, "triple": 3, "third": 3, "four": 4, "quarter": 4,
    "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "dozen": 12, "%": 100, "percent": 100, "week": 7,
    "day": 24, "hour": 60, "minute": 60, "year": 12, "foot": 12, "feet": 12, "once": 1, "one": 1,
}  # fmt: skip
_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def sums(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return the share of an answer's sums that are right; 0 where the last one's result is not the answer."""
    texts = ([text.replace(",", "") for text in side] for side in (prompts, completions))
    return [_worth(question, answer) for question, answer in zip(*texts, strict=True)]


def _worth(question: str, answer: str) -> float:
    known = {float(number) for number in _NUMBER.findall(question)}
    known |= {float(value) for word, value in _WORDS.items() if word in question.lower()}
    right, result = [], None
    for left, written in _SUM.findall(answer):
        result = float(written) if _NUMBER.fullmatch(written) else None
        right.append(result is not None and _comes_to(left, result, known))
        known |= {result} if result is not None else set()
    final = _FINAL.search(answer)
    if final is None or float(final[1]) != result:
        return 0.0
    return sum(right) / len(right)


def _comes_to(left: str, result: float, known: set[float]) -> bool:
    """Whether known numbers with + - * / ( ) between them come to a result."""
    if not any(sign in left.strip().lstrip("+-") for sign in "+-*/"):
        return False
    if not known.issuperset(map(float, _NUMBER.findall(left))):
        return False
    try:
        with warnings.catch_warnings(action="ignore"):  # 3(4) looks like a call
            value = _value(ast.parse(left.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return False  # a model writes anything
    return abs(value - result) <= 1e-4 * max(1.0, abs(result))


def _value(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.BinOp(left, sign, right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left), _value(right))
        case ast.UnaryOp(sign, operand) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(operand))
    raise ValueError("this is no sum")

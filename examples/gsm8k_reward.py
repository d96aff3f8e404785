r"""A reward of your own: are the sums right that an answer in GSM8K's style spells out, as in <<48/2=24>>?

    qosora train --method grpo --model my-base --data train.jsonl --output-dir my-adapter \
        --reward number --reward examples/gsm8k_reward.py:sums

A reward gets lists, one entry for each answer: of completions, of prompts, and of every other column of the data. It
returns a number for each. The last number of an answer is right too seldom for a small model to learn from it alone;
this one is worth something for each step on the way.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from typing import Any

_SUM = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def sums(completions: list[str], **_: Any) -> list[float]:
    """Return the share of an answer's sums that are right; 0 for an answer without any."""
    return [_share([_right(*found) for found in _SUM.findall(answer)]) for answer in completions]


def _share(right: list[bool]) -> float:
    return sum(right) / len(right) if right else 0.0


def _right(left: str, result: str) -> bool:
    """Whether `left`, of numbers with + - * / ( ) between them, comes to `result`."""
    try:
        with warnings.catch_warnings(action="ignore"):  # 3(4) looks like a call
            value, expected = _value(ast.parse(left.strip(), mode="eval").body), float(result)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return False  # a model writes anything
    return abs(value - expected) <= 1e-4 * max(1.0, abs(expected))


def _value(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.BinOp(left, sign, right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left), _value(right))
        case ast.UnaryOp(sign, operand) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(operand))
    raise ValueError("this is no sum")

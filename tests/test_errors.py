"""Codes of errors, and docs/errors.md, which explains them: it names every code, and messages that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import qosora
from qosora import errors
from qosora.errors import EndedElsewhere, QosoraError

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def messages() -> str:
    """All texts in qosora's code, those that are put together of parts joined."""
    found = []
    for path in Path(qosora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_class_has_its_code_and_the_docs_say_which():
    classes: list[type[QosoraError]] = [QosoraError, *QosoraError.__subclasses__()]
    classes = [kind for kind in classes if kind.__module__ == errors.__name__ and kind is not EndedElsewhere]
    codes = {kind.code: kind.__name__ for kind in classes}
    assert len(codes) == len(classes) == 6
    listed = dict(re.findall(r"^\| (Q-\w+) \| `(\w+)` \|", TEXT, re.MULTILINE))
    assert listed == {**codes, "Q-FILE": "OSError"}
    assert re.findall(r"^## (Q-\w+)", TEXT, re.MULTILINE) == [code for code in listed if code != "Q-FILE"]


def test_the_messages_that_the_docs_explain_exist():
    known = messages()
    quoted = re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE)
    assert len(quoted) > 30
    assert [text for text in quoted if text not in known] == []

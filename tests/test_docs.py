"""What README, docs and examples say: commands parse, Python imports what there is, links lead somewhere.

What commands and functions do is for their own tests.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from qosora import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            yield page.name, block


def commands() -> Iterator[tuple[str, list[str]]]:
    texts = [*blocks("sh"), *blocks("bash")]
    texts += [(path.name, "".join(re.findall(r"^#   (.*\n)", path.read_text(encoding="utf-8"), re.MULTILINE)))
              for path in (ROOT / "examples").glob("*.yaml")]  # fmt: skip
    for name, text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "qosora" in words:
                yield name, words[words.index("qosora") + 1 :]


def test_commands_parse(capsys: pytest.CaptureFixture[str]):
    found = list(commands())
    assert len(found) > 60
    parser = cli.build_parser()
    bad = []
    for name, words in found:
        try:
            parser.parse_args(words)
        except SystemExit as ended:
            if ended.code:
                bad.append(f"{name}: qosora {shlex.join(words)}: {capsys.readouterr().err}")
    assert not bad


def test_python_imports_what_there_is():
    found = [(name, block) for name, block in blocks("python") if ">>>" not in block]
    assert len(found) >= 5
    for name, block in found:
        for node in ast.walk(ast.parse(block, name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "qosora":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name}: {node.module} has no {alias.name}"


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"

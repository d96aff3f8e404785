"""Write docs/reference.md from the code: every command with its options, and all that `qosora` exports.

python docs/make_reference.py            # write it
python docs/make_reference.py --check    # exit with 1 where it is not what the code says
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qosora
from qosora.cli import build_parser

FILE = Path(__file__).with_name("reference.md")
HEAD = """\
# Reference

Written by `python docs/make_reference.py` from the code: the command line, then Python.
"""


def commands() -> Iterator[str]:
    """Give a section for each command."""
    found: dict[str, Any] = build_parser().get_default("commands").choices
    names: dict[int, list[str]] = {}
    for name, parser in found.items():
        names.setdefault(id(parser), []).append(name)
    for parser in dict.fromkeys(found.values()):
        name = ", ".join(names[id(parser)])
        yield f"### qosora {name}\n\n{_flowed(parser.description or '')}\n"
        yield "| option | |\n|---|---|"
        for action in parser.arguments:
            if action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
                yield f"| {_option(action)} | {_cell(action.help or '')} |"
        yield f"\n```sh\n{inspect.cleandoc((parser.epilog or '').partition(chr(10))[2])}\n```\n"


def _option(action: argparse.Action) -> str:
    value = "/".join(map(str, action.choices)) if action.choices else action.metavar or ""
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    takes = f" {value}" if action.option_strings and action.nargs != 0 and value else ""
    return f"`{names}{takes}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")


def _flowed(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def python() -> Iterator[str]:
    """Give a section for each name that `qosora` exports."""
    for name in sorted(set(qosora.__all__) - {"__version__"}, key=str.lower):
        found: Any = getattr(qosora, name)
        kind = "class " if inspect.isclass(found) else ""
        code = f"```text\n{kind}qosora.{name}{_signature(found)}\n```"
        yield f"### {name}\n\n{code}\n\n{_prose(inspect.getdoc(found) or '')}\n"


def _signature(found: Any) -> str:
    """Return the parameters, a line for each where they are many."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return ""
    parts = [re.sub(r"<[^>]*>", "...", str(p).replace("'", "")) for p in signature.parameters.values()]
    parts = [part for part in parts if part not in ("self", "cls")]
    keyword = [p.kind is p.KEYWORD_ONLY for p in signature.parameters.values()]
    if any(keyword) and not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        parts.insert(keyword.index(True), "*")
    one = f"({', '.join(parts)})"
    return one if len(one) < 90 else "(\n    " + ",\n    ".join(parts) + ",\n)"


def _prose(docstring: str) -> str:
    """Return a docstring as Markdown: its sections are lists, its examples code."""
    lines, out, section = docstring.splitlines(), list[str](), ""
    for line in lines:
        head = re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples):", line)
        if head:
            if section == "code":
                out.append("```")
            section = "code" if head[1].startswith("Example") else head[1]
            out += ["", f"**{head[1]}**", ""] + (["```python"] if section == "code" else [])
        elif section == "code":
            out.append(line.removeprefix("    ").removesuffix("  # doctest: +SKIP"))
        elif section in ("Returns", "Yields"):
            out.append(line.removeprefix("    "))
        elif section and (item := re.fullmatch(r" {4}(\*{0,2}\w[\w.]*): (.*)", line)):
            out.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith("        "):
            out.append("  " + line.strip())
        else:
            out.append(line)
    if section == "code":
        while out[-1] == "":
            out.pop()
        out.append("```")
    return "\n".join(out).strip()


def text() -> str:
    """Return the whole page."""
    parts = [HEAD, "## Commands\n", *commands(), "## Python\n", *python()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def main() -> int:
    """Write the page, or say whether it is what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        FILE.write_text(text(), encoding="utf-8")
    elif not FILE.is_file() or FILE.read_text(encoding="utf-8") != text():
        print(f"{FILE} is not what the code says: python docs/make_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`qosora chat`."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from qosora.cli.options import add_model, at_least_one, load
from qosora.cli.output import escaped
from qosora.errors import QosoraError

if TYPE_CHECKING:
    from qosora.inference import Chat

NAME = "chat"
HELP = "talk to a base, or to adapters on it"
EXAMPLES = """\
  qosora chat ./my-adapter
  qosora chat ./my-adapter --adapter ./my-other-adapter --system "Answer in one sentence."\
"""
_COMMANDS = """\
In the chat:
  /adapter NAME    have an adapter answer, or the base; an adapter's folder is loaded first
  /compare TEXT    have all of them answer; nothing is remembered
  /image FILE      show an image with what is said next, to a model that sees
  /system TEXT     begin anew, with that said by the system
  /forget          begin anew
  /quit            so does the end of the input"""

_NAMES = "/adapter NAME, /compare TEXT, /image FILE, /system TEXT, /forget, /quit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = f"{parser.description}\n\n{_COMMANDS}"
    add_model(parser)
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR", help="another adapter; repeatable")
    parser.add_argument("--system", metavar="TEXT", help="what the system says first")
    parser.add_argument("--max-new-tokens", type=at_least_one, default=512, metavar="N", help="(default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="likeliest tokens to take (default: all)")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.inference import Chat

    model, tokenizer = load(args)
    chat = Chat(
        model,
        tokenizer,
        name=Path(args.model).expanduser().resolve().name,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    for adapter in args.adapter:
        chat.add(adapter)
    print(f"{', '.join(chat.speakers)}: {chat.speaker} answers. {_NAMES}")
    for line in _lines(chat):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        try:
            _obey(chat, command, rest.strip(), line)
        except KeyboardInterrupt:  # of an answer; it is forgotten
            print()
        except QosoraError as error:
            print(escaped(f"error: {error}"), file=sys.stderr)


def _lines(chat: Chat) -> Iterator[str]:
    """Give what the user says, until there is no more."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (lines can be edited, and come back)
    while True:
        try:
            line = input(f"{escaped(chat.speaker)}> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _obey(chat: Chat, command: str, rest: str, line: str) -> None:
    if command == "/adapter":
        if rest and rest not in chat.speakers and Path(rest).expanduser().is_dir():
            rest = chat.add(rest)
        chat.use(rest)
        print(escaped(f"{chat.speaker} answers from now on"))
    elif command == "/compare":
        print(side_by_side(chat.compare(rest), shutil.get_terminal_size().columns))
    elif command == "/image":
        chat.show(rest)
    elif command in ("/system", "/forget"):
        chat.begin(rest if command == "/system" else None)
    elif line.startswith("/"):
        print(_NAMES)
    else:
        chat.answer(line, lambda piece: print(escaped(piece), end="", flush=True))
        print()


def side_by_side(texts: Mapping[str, str], width: int) -> str:
    """Return texts in columns, each under its name; one below the other where the columns would be narrow."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < 24:
        return "\n\n".join(f"{name}:\n{escaped(text)}" for name, text in texts.items())
    cells = [
        [name, "-" * column, *(part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""])]
        for name, text in ((escaped(name)[:column], escaped(text)) for name, text in texts.items())
    ]
    rows = zip_longest(*cells, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(column) for cell in row).rstrip() for row in rows)

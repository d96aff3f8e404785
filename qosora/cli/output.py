"""Printing: tables, sizes, JSON, progress bars."""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qosora.checkpoints import Progress

__all__ = ["escaped", "print_json", "progress_bar", "quiet_stdout", "size", "table"]


def escaped(text: str) -> str:
    """Return a text with what is not to be printed escaped: names from files may hold a terminal's control codes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def progress_bar(label: str, *, hidden: bool) -> Iterator[Callable[..., None]]:
    """Give a function that shows a `Progress`, with a note behind it."""
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
    with tqdm(total=0, desc=label, unit="B", unit_scale=True, bar_format=form, disable=hidden or None) as bar:

        def show(state: Progress, note: str = "") -> None:
            bar.total, bar.n = state.total_bytes, state.done_bytes
            left = "?" if state.seconds_left is None else bar.format_interval(state.seconds_left)
            bar.set_postfix_str(f"{state.done}/{state.total} tensors{note}, {left} left")

        yield show


@contextmanager
def quiet_stdout(wanted: bool) -> Iterator[None]:
    """Keep what other libraries print out of the output that a program is to read; some print at the very end, too."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield
    atexit.register(setattr, sys, "stdout", sys.stderr)


def print_json(value: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(value, indent=2, sort_keys=False))


def size(count: float) -> str:
    """Return bytes in a binary unit: 1536 is '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an aligned table: the first column to the left, the others to the right."""
    cells = [list(head), *[[str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])

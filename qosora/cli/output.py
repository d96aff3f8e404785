"""Printing: tables, sizes, JSON, progress bars."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qosora.checkpoints import Progress

__all__ = [
    "add_json",
    "add_model",
    "add_overwrite",
    "add_shards",
    "at_least_one",
    "load",
    "print_json",
    "progress_bar",
    "size",
    "table",
]


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a base or an adapter, and how to load it."""
    parser.add_argument("model", metavar="MODEL", help="folder of an adapter, or a base (folder or hub id)")
    parser.add_argument("--base", metavar="BASE", help="the adapter's base, where it is not where the adapter says")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of what is not decomposed, and of the computation (default: the base's)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that the base brings")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite and --restart."""
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew, where else an interrupted run would go on (in OUT.partial)"
    )


def add_shards(parser: argparse.ArgumentParser) -> None:
    """Add --max-shard-size."""
    parser.add_argument("--max-shard-size", type=float, default=1.0, metavar="GB", help="of the files (default: 1)")


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


def at_least_one(text: str) -> int:
    """Return a count that an option gives. argparse makes usage errors of what this raises."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and the tokenizer that the arguments of `add_model` name."""
    from qosora.base import load_model, load_tokenizer
    from qosora.checkpoints import split_source

    base, adapter = split_source(args.model, args.base)
    model = load_model(args.model, base=args.base, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    return model, load_tokenizer(adapter, base, trust_remote_code=args.trust_remote_code)


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

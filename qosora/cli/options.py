"""Flags that several commands have, and what they name."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_json", "add_model", "add_overwrite", "add_push", "add_shards", "at_least_one", "load", "pushed"]


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a base or an adapter, and how to load it."""
    parser.add_argument("model", metavar="MODEL", help="an adapter, or a base (folder or hub id)")
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


def add_push(parser: argparse.ArgumentParser) -> None:
    """Add --push-to-hub."""
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="then put the result on the hub, OWNER/NAME, as `qosora push` does"
    )


def pushed(folder: str, repo: str | None) -> dict[str, str]:
    """Put a folder on the hub if --push-to-hub says so, and return what --json is to say of it."""
    if repo is None:
        return {}
    from qosora.hub import push

    return {"address": push(folder, repo)}


def at_least_one(text: str) -> int:
    """Return a count that an option gives. argparse makes usage errors of what this raises."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and the tokenizer that the arguments of `add_model` name."""
    from qosora.base import load_adapted, load_tokenizer
    from qosora.checkpoints import split_source

    base, adapter = split_source(args.model, args.base)
    model = load_adapted(base, adapter, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    return model, load_tokenizer(adapter, base, trust_remote_code=args.trust_remote_code)

"""`qosora verify`."""

from __future__ import annotations

import argparse

from qosora.cli.options import add_json
from qosora.cli.output import print_json

NAME = "verify"
HELP = "read every byte of a base, an adapter (and its base) or an export, and compare it with its manifest"
EXAMPLES = """\
  qosora verify ./my-base
  qosora verify ./my-adapter
  qosora verify ./my-adapter --base ./my-base"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="a base, an adapter or an export")
    parser.add_argument("--base", metavar="BASE", help="the adapter's base, where it is not where the adapter says")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.base import verify
    from qosora.errors import CheckpointError

    found = verify(args.folder, base=args.base)
    if args.json:
        print_json(found)
    if found["problems"]:
        raise CheckpointError(f"{args.folder}: " + "; ".join(found["problems"]))
    if not args.json:
        print("\n".join(f"{folder}: {count} files as they were written" for folder, count in found["files"].items()))
        if found["fingerprint"] is not None:
            print(f"the adapter belongs to the base (fingerprint {found['fingerprint']})")

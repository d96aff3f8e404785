"""`qosora push`."""

from __future__ import annotations

import argparse

from qosora.cli.options import add_json
from qosora.cli.output import print_json

NAME = "push"
HELP = "put a base, an adapter or an export on the hub, with a card that says what it is"
EXAMPLES = """\
  qosora push ./my-base me/llama-2-7b-qosora
  qosora push ./my-adapter me/my-adapter --base me/llama-2-7b-qosora --private
  qosora push ./my-gguf me/my-model-gguf"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="as quantize, train or export wrote it; it stays as it is")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub; made if it is not there")
    parser.add_argument("--base", metavar="REPO", help="of an adapter: where others get its base, OWNER/NAME")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.hub import push

    address = push(args.folder, args.repo, base=args.base, private=args.private)
    if args.json:
        print_json({"address": address})
    else:
        print(address)

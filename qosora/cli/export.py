"""`qosora export`."""

from __future__ import annotations

import argparse
from typing import Any

from qosora.cli.output import add_json, add_overwrite, add_shards, print_json, progress_bar, size

NAME = "export"
HELP = "write base and adapter as an ordinary Hugging Face checkpoint"
EXAMPLES = """\
  qosora export ./my-adapter ./my-model
  qosora export ./my-adapter ./my-model --dtype float16 --base ./my-base
  qosora export ./my-base ./dequantized"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder of an adapter, or a base to dequantize as it is")
    parser.add_argument("output", metavar="OUT", help="folder to make; plain transformers loads it, without qosora")
    parser.add_argument("--base", metavar="BASE", help="the adapter's base, where it is not where the adapter says")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights, which are merged in float32 and cast once (default: the base's)",
    )
    add_shards(parser)
    add_overwrite(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that the base brings")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.export import export_merged
    from qosora.models import split_source

    base, adapter = split_source(args.model, args.base)
    with progress_bar("merging", hidden=args.json) as show:
        report = export_merged(
            base,
            args.output,
            adapter,
            dtype=args.dtype,
            max_shard_bytes=int(args.max_shard_size * 1e9),
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
            restart=args.restart,
            progress=show,
        )
    result: dict[str, Any] = report.to_dict()
    if args.json:
        print_json(result)
    else:
        print(f"{args.output}: {size(result['total_bytes'])} in {result['dtype']}, loads with plain transformers")

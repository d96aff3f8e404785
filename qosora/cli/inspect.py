"""`qosora inspect`."""

from __future__ import annotations

import argparse
from typing import Any

from qosora.cli.options import add_json
from qosora.cli.output import escaped, print_json, size
from qosora.cli.quantize import kinds_table

NAME = "inspect"
HELP = "show what a base or an adapter holds"
EXAMPLES = """\
  qosora inspect ./my-base
  qosora inspect ./my-adapter --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder of a base or an adapter")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.base.inspected import inspected

    found = inspected(args.folder)
    if args.json:
        print_json(found)
    else:
        print(escaped("\n".join(_base(found) if found["kind"] == "base" else _adapter(found))))


def _base(found: dict[str, Any]) -> list[str]:
    storage = found["quantization"]
    lines = [
        f"{found['folder']}: qosora base, {found['architecture']}",
        f"  fingerprint    {found['fingerprint']}",
        f"  storage        rank {storage['rank']}, {storage['quant_type']}, blocks of {storage['blocksize']}, "
        f"double quantization {'on' if storage['double_quant'] else 'off'}"
        + (f", embeddings in {storage['embeddings']}" if storage.get("embeddings") else ""),
        f"  size           {size(found['total_bytes'])}: residuals {size(found['residual_bytes'])}, "
        f"factors {size(found['factors_bytes'])}, not decomposed {size(found['other_bytes'])}",
        f"  an adapter     {found['adapter_parameters']:,} parameters in {found['adapted_layers']} layers, "
        f"{size(found['adapter_bytes'])}",
    ]
    if found["labels"]:
        lines.append(f"  classes        {', '.join(found['labels'])}")
    if found["by_kind"]:
        lines += ["", "relative error of the weights:", kinds_table(found["by_kind"], storage["quant_type"])]
    return lines


def _adapter(found: dict[str, Any]) -> list[str]:
    trained = "s and o" if found["vectors"] == "both" else found["vectors"]
    if found["update_rank"]:
        trained += f", and an update of rank {found['update_rank']},"
    lines = [
        f"{found['folder']}: OSoRA adapter",
        f"  base           {found['base']}, fingerprint {found['base_fingerprint']}",
        f"  trained        {trained} of {found['adapted_layers']} layers: {found['adapter_parameters']:,} parameters",
        f"  size           {size(found['file_bytes'])}",
    ]
    if found["modules_to_save"]:
        lines.append(
            f"  also trained   {', '.join(found['modules_to_save'])}: {found['other_parameters']:,} parameters"
        )
    return lines

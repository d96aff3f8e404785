"""`qosora demo`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qosora.cli.options import add_json
from qosora.cli.output import print_json, size, table
from qosora.cli.quantize import kinds_table

NAME = "demo"
HELP = "decompose, fine-tune and export the built-in tiny model; takes under two minutes on a CPU"
EXAMPLES = """\
  qosora demo
  qosora demo --output-dir /tmp/demo --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--output-dir", default="demo-output", metavar="DIR", help="for base, adapter and export (default: demo-output)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.demo import run_demo

    result = run_demo(args.output_dir, step=lambda name: print(f"{name} ...", file=sys.stderr))
    if args.json:
        print_json(result.to_dict())
    else:
        print("\n".join(_report(result, args.output_dir)))


def _report(result: Any, folder: str) -> list[str]:
    before, after = result.before, result.after
    layers = result.conversion.layers
    names = ("error", "bits_per_parameter", "nf4_error", "nf4_bits_per_parameter")
    error, bits, nf4_error, nf4_bits = (sum(getattr(r, name) for r in layers) / len(layers) for name in names)
    rows = [
        ["weights: relative error", f"{error:.4f}", f"(plain NF4: {nf4_error:.4f})"],
        ["weights: bits per parameter", f"{bits:.1f}", f"(plain NF4: {nf4_bits:.1f}; of a 7B model: 4.3 to 4.4)"],
        ["trained parameters", f"{result.trainable_parameters:,}", f"in {len(layers)} layers"],
        ["held-out loss", f"{before.loss:.3f}", f"-> {after.loss:.3f}"],
        ["held-out exact match", f"{before.exact_match:.1%}", f"-> {after.exact_match:.1%}"],
        ["adapter file", size(result.adapter_bytes), ""],
        ["exported model (float32)", size(result.export_bytes), "plain transformers loads it"],
        [
            "largest logit difference, adapted model to export",
            f"{result.largest_logit_difference:.1e}",
            f"of logits up to {result.largest_logit:.1f}",
        ],
        ["seconds", f"{sum(result.seconds.values()):.0f}", f"of which training {result.seconds['train']:.0f}"],
    ]
    lines = ["", kinds_table(result.conversion.by_kind(), "nf4"), "", table(["demo", "", ""], rows), ""]
    for first, then in zip(before.samples, after.samples, strict=True):
        lines += [
            f"> {first.prompt}",
            f"  before:    {_one_line(first.generated)}",
            f"  after:     {_one_line(then.generated)}",
            f"  expected:  {_one_line(first.expected)}",
            "",
        ]
    return [
        *lines,
        f"{folder}/base, {folder}/adapter and {folder}/export are yours to try:",
        f"  qosora inspect {folder}/adapter",
        f"  qosora generate {folder}/adapter --prompt $'Message: Hello, this is Ida. I would like four red hats, "
        "delivered to the barn.\\nQuestion: What is the ticket?\\nAnswer:'",
    ]


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())

"""`qosora report`."""

from __future__ import annotations

import argparse

NAME = "report"
HELP = "draw what a training run did, or compare several, on one HTML page"
EXAMPLES = """\
  qosora report ./my-adapter
  qosora report ./run-a ./run-b --output compared.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder that qosora train has written; it may not be done"
    )
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder, or here")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.training.report import report

    print(report(args.runs, args.output))

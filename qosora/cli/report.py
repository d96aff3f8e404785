"""`qosora report`."""

from __future__ import annotations

import argparse

from qosora.cli.options import at_least_one

NAME = "report"
ALIASES = ("compare",)
HELP = "draw what a training run did, or compare several, on one HTML page"
EXAMPLES = """\
  qosora report ./my-adapter --answers 5
  qosora compare ./run-a ./run-b --output compared.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder that qosora train has written; it may not be done"
    )
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder, or here")
    parser.add_argument(
        "--answers",
        type=at_least_one,
        default=0,
        metavar="N",
        help="answer N prompts of each run's evaluation data, or training data, before and after it (loads the model)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.memory import planned_peak
    from qosora.training.report import report

    print(report(args.runs, args.output, answers=args.answers, planned=planned_peak))

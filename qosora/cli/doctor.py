"""`qosora doctor`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qosora.cli.options import add_json
from qosora.cli.output import print_json
from qosora.errors import QosoraError

if TYPE_CHECKING:
    from qosora.doctor import Diagnosis

NAME = "doctor"
HELP = "say whether training works on this machine, and what is missing for it to work well"
EXAMPLES = """\
  qosora doctor
  qosora doctor --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.doctor import diagnose

    found = diagnose()
    if args.json:
        print_json(found.to_dict())
    else:
        print("\n".join(_lines(found)))
    if not found.works:
        raise QosoraError(found.verdict)


def _lines(found: Diagnosis) -> list[str]:
    width = max(len(finding.name) for finding in found.findings)
    lines = [f"{finding.name.ljust(width)}  {finding.found}" for finding in found.findings]
    advice = [
        f"{'!' if finding.stops else '-'} {finding.name}: {finding.advice}"
        for finding in found.findings
        if finding.advice
    ]
    return [*lines, *([""] if advice else []), *advice, *(["", found.verdict] if found.works else [])]

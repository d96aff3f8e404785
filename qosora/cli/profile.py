"""`qosora profile`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qosora.cli.options import add_json, at_least_one
from qosora.cli.output import print_json, size, table
from qosora.cli.plan import add_report, add_step, step_options, where

if TYPE_CHECKING:
    from qosora.memory import Measurement

NAME = "profile"
HELP = "run training steps and measure their memory, beside what `plan` predicts"
EXAMPLES = """\
  qosora profile ./my-base --data train.jsonl --batch-size 4
  qosora profile llama-3.1-8b --seq-len 2048 --batch-size 1
  qosora profile ./my-base --seq-len 512 --no-gradient-checkpointing --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="base (folder or hub id), or a shape as for plan, which gets random weights"
    )
    add_step(parser, precision=None)
    parser.add_argument("--data", metavar="DATA", help="training data, of which the longest examples make the batch")
    for part in ("prompt", "completion", "messages", "text"):
        parser.add_argument(f"--{part}-column", metavar="NAME", help=f"column of the {part}, where it is not {part}")
    parser.add_argument("--steps", type=at_least_one, default=3, metavar="N", help="steps to time (default: 3)")
    add_report(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that MODEL brings")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.data import Columns
    from qosora.memory.profile import profile
    from qosora.memory.report import report
    from qosora.pages import require_plots

    if args.report:
        require_plots()
    columns = Columns(args.prompt_column, args.completion_column, args.messages_column, args.text_column)
    found = profile(args.model, steps=args.steps, data=args.data, columns=columns, **step_options(args))
    if args.json:
        print_json(found.to_dict())
    else:
        print("\n".join(_lines(found)))
    if args.report:
        report(found, found.events, args.report)


def _lines(found: Measurement) -> list[str]:
    batch = found.batch
    lines = [
        f"{found.model}: {batch.size} x {batch.length} tokens, {found.options.precision}, on {found.device}",
        "",
        _rows(found),
        "",
        f"peak: {where(found.live)}",
        f"step: {found.step_seconds:.3f} s, {found.tokens_per_second:,.0f} tokens/s",
    ]
    if found.planned is not None:
        lines.append(f"planned {size(found.planned.allocated_bytes)}, measured {size(found.measured_bytes)}: "
                     f"{found.difference:+.2%}")  # fmt: skip
    if found.allocated_bytes:
        phases = ", ".join(f"{phase} {size(value)}" for phase, value in found.allocated_bytes.items())
        lines.append(f"allocated by CUDA at most: {phases}; reserved {size(found.reserved_bytes)}")
        lines.append(f"in use on the GPU, by all processes: {size(found.device_used_bytes)}")
    phases = ", ".join(f"{phase} {size(value)}" for phase, value in found.rss_bytes.items())
    return [*lines, f"resident memory of the process after each phase: {phases}"]


def _rows(found: Measurement) -> str:
    """Return measured and planned bytes by category and by phase."""
    columns = [found.live] if found.planned is None else [found.live, found.planned]
    names = dict.fromkeys(name for usage in columns for name in usage.rows)
    rows = [[name, *(size(usage.rows.get(name, 0)) for usage in columns)] for name in names]
    rows += [[f"peak of {p}", *(size(usage.phases.get(p, 0)) for usage in columns)] for p in found.live.phases]
    rows.append(["peak", *(size(usage.allocated_bytes) for usage in columns)])
    return table(["live tensors", "measured", "planned"][: len(columns) + 1], rows)

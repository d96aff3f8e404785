"""Plan a model's memory, measure a training step, and draw both.

    python examples/profile_memory.py llama-3.2-1b --seq-len 2048 --batch-size 1 --output-dir pictures

The model is a built-in shape (with random weights) or the folder of a qosora base. `qosora plan` and `qosora profile`
do the same from the command line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import qosora
from qosora.memory import events
from qosora.memory.report import report


def main() -> None:
    """Plan for a 24 GB card, measure here, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a shape, or folder of a qosora base")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--output-dir", default="pictures")
    args = parser.parse_args()
    shape = {"seq_len": args.seq_len, "batch_size": args.batch_size}

    planned = qosora.plan(args.model, gpu="RTX 4090", grid=False, **shape)
    print(f"on an RTX 4090: {planned.usage.total_bytes / 2**30:.2f} GiB, {planned.verdict}")
    for advice in planned.advice:
        print(f"  {advice.change} saves {advice.saved_bytes / 2**30:.2f} GiB")
    report(planned, events(args.model, planned), Path(args.output_dir) / "planned")

    measured = qosora.profile(args.model, steps=2, **shape)
    print(f"here, on {measured.device}: {measured.measured_bytes / 2**30:.2f} GiB measured, {measured.difference:+.2%}")
    print(f"{measured.tokens_per_second:,.0f} tokens/s")
    report(measured, measured.events, Path(args.output_dir) / "measured")


if __name__ == "__main__":
    main()

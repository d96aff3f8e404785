"""`qosora generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qosora.cli.options import add_json, add_model, at_least_one, load
from qosora.cli.output import print_json
from qosora.errors import ConfigError

NAME = "generate"
HELP = "answer prompts with a base, or with an adapter on it"
EXAMPLES = """\
  qosora generate ./my-adapter --prompt "What is SVD?" --chat
  qosora generate ./my-adapter --prompt-file questions.txt --json
  qosora generate ./my-seeing-adapter --prompt "What colour?" --image a.png --chat
  echo "Once upon a time" | qosora generate ./my-base --temperature 0.8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable; standard input without any")
    parser.add_argument("--prompt-file", metavar="FILE", help="one prompt a line")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="what a model that sees is asked about; repeatable"
    )
    parser.add_argument("--chat", action="store_true", help="wrap each prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=at_least_one, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    parser.add_argument("--batch-size", type=at_least_one, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += [
            line
            for line in Path(args.prompt_file).expanduser().read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    if not prompts and not args.prompt_file:
        prompts = [sys.stdin.read().rstrip("\n")]
    if not any(prompts):
        raise ConfigError("no prompt: give --prompt, --prompt-file, or text on standard input")

    from qosora.inference import generate

    waiting: dict[int, str] = {}
    shown = 0

    def written(index: int, answer: str) -> None:
        """Print an answer as soon as those before it are."""
        nonlocal shown
        waiting[index] = answer
        while shown in waiting:
            text = waiting.pop(shown)
            shown += 1
            print(text if len(prompts) == 1 else f"{chr(10) * (shown > 1)}> {prompts[shown - 1]}\n{text}", flush=True)

    answers = generate(
        *load(args),
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        chat=args.chat,
        images=[args.image] * len(prompts),
        batch_size=args.batch_size,
        seed=args.seed,
        written=None if args.json else written,
    )
    if args.json:
        print_json([{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)])

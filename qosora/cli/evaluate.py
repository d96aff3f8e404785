"""`qosora eval`."""

from __future__ import annotations

import argparse
from typing import Any

from qosora.cli.options import add_json, add_model, at_least_one, load
from qosora.cli.output import escaped, print_json, table
from qosora.errors import ConfigError

NAME = "eval"
HELP = "measure loss and perplexity, or accuracy and F1 of a classifier, on data"
EXAMPLES = """\
  qosora eval ./my-adapter --data test.jsonl
  qosora eval ./my-base --data test.jsonl --limit 200 --json
  qosora eval ./my-adapter --data gsm8k.jsonl --prompt-column question --completion-column answer --chat \\
      --exact-match --answer-pattern '#### (.+)'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="DATA", help="file or hub data set, as for train")
    parser.add_argument("--split", metavar="NAME", help="split of a hub data set")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="use the first N examples only")
    for part in ("prompt", "completion", "messages", "text", "label"):
        parser.add_argument(f"--{part}-column", metavar="NAME", help=f"column of the {part}, where it is not {part}")
    parser.add_argument("--chat", action="store_true", help="wrap prompt and completion into the chat template")
    parser.add_argument(
        "--max-length", type=at_least_one, default=1024, metavar="N", help="cut examples (default: 1024)"
    )
    parser.add_argument("--batch-size", type=at_least_one, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--exact-match", action="store_true", help="also generate, and count equal completions")
    parser.add_argument("--answer-pattern", metavar="REGEX", help="compare only the last match of this in each answer")
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=256, metavar="N", help="for --exact-match (default: 256)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.checkpoints import REWARD, TAGS, TEXTS, task_of
    from qosora.data import Columns
    from qosora.inference import evaluate

    columns = Columns(
        args.prompt_column, args.completion_column, args.messages_column, args.text_column, args.label_column
    )
    model, tokenizer = load(args)
    if task_of(model.config) in (TEXTS, TAGS):
        _classes(args, model, tokenizer, columns)
        return
    if task_of(model.config) == REWARD:
        _rewards(args, model, tokenizer, columns)
        return
    result = evaluate(
        model,
        tokenizer,
        args.data,
        split=args.split,
        columns=columns,
        chat=args.chat,
        limit=args.limit,
        max_length=args.max_length,
        batch_size=args.batch_size,
        exact_match=args.exact_match,
        answer_pattern=args.answer_pattern,
        max_new_tokens=args.max_new_tokens,
    )
    if args.json:
        print_json(result.to_dict())
        return
    print(f"loss         {result.loss:.4f}")
    print(f"perplexity   {result.perplexity:.4g}")
    print(f"over         {result.tokens:,} tokens of {result.examples:,} examples")
    if result.exact_match is not None:
        print(f"exact match  {result.exact_match:.1%}")
        for sample in result.samples:
            print(f"\n{sample.prompt}\n  expected:  {sample.expected.strip()}\n  generated: {sample.generated.strip()}")


def _classes(args: argparse.Namespace, model: Any, tokenizer: Any, columns: Any) -> None:
    """Print how often a classifier is right."""
    from qosora.inference import evaluate_classes

    if args.exact_match or args.chat:
        raise ConfigError("a classifier writes no text: leave out --exact-match and --chat")
    result = evaluate_classes(
        model,
        tokenizer,
        args.data,
        split=args.split,
        columns=columns,
        limit=args.limit,
        max_length=args.max_length,
        batch_size=args.batch_size,
    )
    if args.json:
        print_json(result.to_dict())
        return
    print(f"loss      {result.loss:.4f}")
    print(f"accuracy  {result.accuracy:.1%}")
    print(f"F1        {result.f1:.4f}")
    print(f"over      {result.labels:,} labels of {result.examples:,} examples")
    print(table(["class", "F1"], [[escaped(name), f"{f1:.4f}"] for name, f1 in result.classes.items()]))


def _rewards(args: argparse.Namespace, model: Any, tokenizer: Any, columns: Any) -> None:
    """Print how often a model of rewards prefers the better answer."""
    from qosora.inference import evaluate_rewards

    if args.exact_match:
        raise ConfigError("a model of rewards writes no text: leave out --exact-match")
    result = evaluate_rewards(
        model,
        tokenizer,
        args.data,
        split=args.split,
        columns=columns,
        chat=args.chat,
        limit=args.limit,
        max_length=args.max_length,
        batch_size=args.batch_size,
    )
    if args.json:
        print_json(result.to_dict())
        return
    print(f"loss      {result.loss:.4f}")
    print(f"accuracy  {result.accuracy:.1%}")
    print(f"margin    {result.margin:.4f}")
    print(f"over      {result.pairs:,} pairs")

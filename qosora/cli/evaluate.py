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

    columns = Columns(
        args.prompt_column, args.completion_column, args.messages_column, args.text_column, args.label_column
    )
    model, tokenizer = load(args)
    measure = {TEXTS: _classes, TAGS: _classes, REWARD: _rewards}.get(task_of(model.config) or "", _language)
    shared = {name: getattr(args, name) for name in ("split", "limit", "max_length", "batch_size")}
    result, lines = measure(args, model, tokenizer, args.data, columns=columns, **shared)
    if args.json:
        print_json(result.to_dict())
    else:
        print("\n".join(lines))


def _language(args: argparse.Namespace, *what: Any, **shared: Any) -> tuple[Any, list[str]]:
    """Return how likely a language model finds the data, and lines of that."""
    from qosora.inference import evaluate

    result = evaluate(
        *what,
        **shared,
        chat=args.chat,
        exact_match=args.exact_match,
        answer_pattern=args.answer_pattern,
        max_new_tokens=args.max_new_tokens,
    )
    lines = [
        f"loss         {result.loss:.4f}",
        f"perplexity   {result.perplexity:.4g}",
        f"over         {result.tokens:,} tokens of {result.examples:,} examples",
    ]
    if result.exact_match is not None:
        lines.append(f"exact match  {result.exact_match:.1%}")
        lines += [
            f"\n{_asked(one.prompt)}\n  expected:  {one.expected.strip()}\n  generated: {one.generated.strip()}"
            for one in result.samples
        ]
    return result, lines


def _asked(prompt: Any) -> str:
    """Return a prompt as it is shown: of a chat what was said last."""
    from qosora.data import text_of

    return prompt if isinstance(prompt, str) else text_of(prompt[-1].get("content")) or ""


def _classes(args: argparse.Namespace, *what: Any, **shared: Any) -> tuple[Any, list[str]]:
    """Return how often a classifier is right, and lines of that."""
    from qosora.inference import evaluate_classes

    if args.exact_match or args.chat:
        raise ConfigError("a classifier writes no text: leave out --exact-match and --chat")
    result = evaluate_classes(*what, **shared)
    return result, [
        f"loss      {result.loss:.4f}",
        f"accuracy  {result.accuracy:.1%}",
        f"F1        {result.f1:.4f}",
        f"over      {result.labels:,} labels of {result.examples:,} examples",
        table(["class", "F1"], [[escaped(name), f"{f1:.4f}"] for name, f1 in result.classes.items()]),
    ]


def _rewards(args: argparse.Namespace, *what: Any, **shared: Any) -> tuple[Any, list[str]]:
    """Return how often a model of rewards prefers the better answer, and lines of that."""
    from qosora.inference import evaluate_rewards

    if args.exact_match:
        raise ConfigError("a model of rewards writes no text: leave out --exact-match")
    result = evaluate_rewards(*what, **shared, chat=args.chat)
    return result, [
        f"loss      {result.loss:.4f}",
        f"accuracy  {result.accuracy:.1%}",
        f"margin    {result.margin:.4f}",
        f"over      {result.pairs:,} pairs",
    ]

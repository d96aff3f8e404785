"""`qosora train`."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, replace
from itertools import groupby
from typing import Any

from qosora.cli.options import add_json, add_push, pushed
from qosora.cli.output import escaped, print_json, quiet_stdout
from qosora.errors import ConfigError, EndedElsewhere, QosoraError
from qosora.training import AUTO, TrainConfig

NAME = "train"
HELP = "fine-tune the vectors of a base on your data"
EXAMPLES = """\
  qosora train --model ./my-base --data train.jsonl --output-dir ./my-adapter
  qosora train --model ./my-base --data train.jsonl --eval-data test.jsonl --output-dir ./my-adapter \\
      --epochs 3 --batch-size 2 --gradient-accumulation 8 --max-length 2048
  qosora train --config run.yaml --learning-rate 1e-2
  qosora train --config ./my-adapter/train_config.yaml --resume
  qosora train --config run.yaml --dry-run --gpu "RTX 4090\""""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config, and one flag for each field of `TrainConfig`."""
    parser.usage = (
        "qosora train --model BASE --data DATA --output-dir DIR [OPTION ...]\n"
        "       qosora train --config FILE [OPTION ...]"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of the options below; flags win over it")
    hints = typing.get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        flag = f"--{field.name.replace('_', '-')}"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field), "dest": field.name}
        kinds = {kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)} or {hints[field.name]}
        if bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        elif hints[field.name] == dict[str, Any]:
            options |= {"action": "append", "metavar": "NAME=VALUE"}
        elif any(typing.get_origin(kind) is list for kind in kinds) or typing.get_origin(hints[field.name]) is list:
            options |= {"nargs": "+", "metavar": "NAME"}
        else:
            kind = next(iter(kinds))
            options |= {"type": kind if kind in (int, float) else str, "metavar": _METAVARS.get(kind, "VALUE")}
            if field.metadata.get("auto"):
                options |= {"type": _number_or_auto, "metavar": "N|auto"}
            if choices := field.metadata.get("choices"):
                options |= {"choices": choices, "metavar": None}
        parser.add_argument(flag, *_EARLIER_FLAGS.get(flag, []), **options)
    parser.add_argument(
        "--dry-run", action="store_true", help="train nothing: show examples as the model sees them, and the plan"
    )
    parser.add_argument(
        "--schema", action="store_true", help="print a JSON schema of configuration files, for editors, and do no more"
    )
    parser.add_argument("--gpu", metavar="NAME", help="with --dry-run: the card to plan for [that of this machine]")
    add_push(parser)
    add_json(parser)


def _number_or_auto(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}")
    return text if text == "auto" else int(text)


_EARLIER_FLAGS = {"--trl": ["--sft"]}
_METAVARS = {int: "N", float: "X"}


def _help(field: Any) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    if text.endswith("]") or field.default is MISSING or field.default is None or field.default is False:
        return text
    return f"{text} [{'yes' if field.default is True else field.default}]"


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import yaml

    if args.schema:
        print_json(TrainConfig.json_schema())
        return
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    if "trl" in given:
        pairs = (item.partition("=") for item in given["trl"])
        given["trl"] = {name: yaml.safe_load(value) for name, _, value in pairs}
    if args.json:
        given["progress"] = False
    first = os.environ.get("RANK", "0") == "0"  # or one of several processes, which find the same
    try:
        config = TrainConfig.load(args.config, given)
        if args.gpu and not args.dry_run:
            raise ConfigError(
                "--gpu names a card to plan for with --dry-run; CUDA_VISIBLE_DEVICES chooses where to train"
            )
        if config.batch_size == AUTO:
            from qosora.memory import fit_batch_size

            config = fit_batch_size(config, gpu=args.gpu)
    except QosoraError as error:
        if first:
            raise
        raise EndedElsewhere(str(error)) from error
    if args.dry_run:
        look(config, args.gpu, as_json=args.json)
        return

    from qosora.base.inspected import inspected
    from qosora.pages import can_draw
    from qosora.training import Processes, train
    from qosora.training.report import report

    with quiet_stdout(args.json):
        result = train(config)
    Processes.leave()
    if not first:
        return
    inspected(config.output_dir)  # as after `quantize`
    if args.json:
        print_json(result.to_dict() | pushed(config.output_dir, args.push_to_hub))
        return
    for line in result.summary():
        print(line)
    if can_draw():
        from qosora.memory import planned_peak

        where = report([config.output_dir], planned=planned_peak)
        print(f"curves, what was learned where, and the plan beside what was measured: {where}")
    written = f"qosora generate {config.output_dir} --prompt ...; " * (config.method not in ("classify", "reward"))
    print(f"next: {written}qosora export {config.output_dir} OUT")
    for address in pushed(config.output_dir, args.push_to_hub).values():
        print(address)


def look(config: TrainConfig, gpu: str | None, *, as_json: bool) -> None:
    """Print what a run would train on, and what a step would take."""
    from qosora.cli.plan import usage_table
    from qosora.memory import plan_run
    from qosora.training import preview_run

    found = preview_run(config)
    planned = plan_run(config, found, gpu=gpu)
    if as_json:
        data = asdict(replace(found, largest=None))
        del data["largest"]
        print_json({"data": data, "plan": planned.to_dict()})
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, tokens in enumerate(found.shown, 1):
        print(f"--- example {number} of {len(found.shown)}: {_LEGEND[colour]}")
        print(_marked(tokens, colour))
    trained_on = f"of which {found.supervised:,} are trained on; " * (found.supervised > 0)
    if config.method == "classify":
        trained_on = f"with {found.supervised:,} classes; "
    elif config.method == "reward":
        trained_on = "all of which count for the reward; "
    print(
        f"--- {found.examples:,} examples, {found.tokens:,} tokens, {trained_on}the longest sequence has "
        f"{found.longest:,}"
    )
    if found.cut or found.dropped:
        print(
            f"{found.cut:,} are cut to {config.max_length:,} tokens, which drops {found.lost:,} to be trained on; "
            f"{found.dropped:,} have none of these and are left out"
        )
    steps = "as many steps as packing makes" if found.steps is None else f"{found.steps:,} steps"
    print(f"{steps} of {config.batch_size} x {config.gradient_accumulation} examples, {found.precision}")
    if found.evaluated:
        print(f"evaluated on {found.evaluated:,} examples before and after")
    print(f"\n{usage_table(planned.usage, None)}")
    if planned.verdict is not None:
        words = {"fits": "fits into", "tight": "fits tightly, if at all, into", "no": "does not fit into"}
        print(f"\n{words[planned.verdict]} {planned.card.name}")
    for advice in planned.advice:
        print(f"  {advice.change}" + ("" if advice.fits else ", not enough by itself"))
    print("nothing was trained: leave out --dry-run")


_LEGEND = {
    False: "tokens end at |, and those in [[ ]] are trained on",
    True: "tokens end at |, and the coloured ones are trained on",
}


def _marked(tokens: Iterable[tuple[str, bool]], colour: bool) -> str:
    """Return tokens in a line of text, those that are trained on marked."""
    before, after = ("\x1b[1;32m", "\x1b[0m") if colour else ("[[", "]]")
    runs = groupby(((escaped(text), trained) for text, trained in tokens), key=lambda token: token[1])
    texts = (("|".join(text for text, _ in group), trained) for trained, group in runs)
    return "|".join(f"{before}{text}{after}" if trained else text for text, trained in texts)

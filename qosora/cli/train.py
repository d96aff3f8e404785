"""`qosora train`."""

from __future__ import annotations

import argparse
import typing
from dataclasses import MISSING, fields
from typing import Any

from qosora.cli.options import add_json
from qosora.cli.output import print_json
from qosora.training import TrainConfig

NAME = "train"
HELP = "fine-tune the vectors of a base on your data"
EXAMPLES = """\
  qosora train --model ./my-base --data train.jsonl --output-dir ./my-adapter
  qosora train --model ./my-base --data train.jsonl --eval-data test.jsonl --output-dir ./my-adapter \\
      --epochs 3 --batch-size 2 --gradient-accumulation 8 --max-length 2048
  qosora train --config run.yaml --learning-rate 1e-2
  qosora train --config ./my-adapter/train_config.yaml --resume"""


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
            if choices := field.metadata.get("choices"):
                options |= {"choices": choices, "metavar": None}
        parser.add_argument(flag, **options)
    add_json(parser)


_METAVARS = {int: "N", float: "X"}


def _help(field: Any) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    if text.endswith("]") or field.default is MISSING or field.default is None or field.default is False:
        return text
    return f"{text} [{'yes' if field.default is True else field.default}]"


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import yaml

    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    if "sft" in given:
        pairs = (item.partition("=") for item in given["sft"])
        given["sft"] = {name: yaml.safe_load(value) for name, _, value in pairs}
    if args.json:
        given["progress"] = False
    config = TrainConfig.load(args.config, given)

    from qosora.training import train

    result = train(config)
    if args.json:
        print_json(result.to_dict())
        return
    for line in result.summary():
        print(line)
    print(f"next: qosora generate {config.output_dir} --prompt ...; qosora export {config.output_dir} OUT")

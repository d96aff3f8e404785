"""The command line: parses, calls the library, prints. No logic of its own, and no torch until a command runs."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import qosora
from qosora.cli import (
    chat,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    profile,
    push,
    quantize,
    report,
    train,
    verify,
)
from qosora.cli.output import escaped, print_json
from qosora.errors import ConfigError, EndedElsewhere, QosoraError, first_line

__all__ = ["main"]

_COMMANDS = (
    plan,
    quantize,
    train,
    report,
    profile,
    evaluate,
    generate,
    chat,
    export,
    push,
    inspect,
    verify,
    doctor,
    demo,
)

_DESCRIPTION = """\
Quantized OSoRA: fine-tune large language models on one consumer GPU.

A model's weights are decomposed once and frozen in 4 bits (quantize); two small
vectors per layer are trained (train); the result leaves as an ordinary Hugging
Face checkpoint (export)."""

_EXAMPLES = """\
try it:
  qosora doctor
  qosora demo
  qosora quantize meta-llama/Llama-2-7b-hf llama-2-7b-qosora
  qosora train --model llama-2-7b-qosora --data train.jsonl --output-dir my-adapter
  qosora export my-adapter my-model"""


class _Parser(argparse.ArgumentParser):
    """Knows its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments: list[argparse.Action] = []
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.arguments.append(action)
        return action


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: Any, *__: Any) -> None:
        import shtab

        for command in parser.get_default("commands").choices.values():
            for action in command.arguments:
                if action.metavar and action.choices is None and action.type in (None, str):  # may be a place
                    action.complete = shtab.FILE
        print(shtab.complete(parser, shell=shell))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="qosora", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"qosora {qosora.__version__}",
        help="show the version (--version --json: also those of packages and system) and exit",
    )
    parser.add_argument(
        "--print-completion", action=_Completion, choices=("bash", "zsh", "tcsh"), help="print a script for your shell"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in _COMMANDS:
        command = commands.add_parser(
            module.NAME,
            aliases=getattr(module, "ALIASES", ()),
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "-v", "--verbose", action="store_true", help="show other libraries' messages, and tracebacks of errors"
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, name=module.NAME)
    parser.set_defaults(commands=commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 for a failure, 2 for wrong usage or configuration."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version", "--json"]:
        from qosora.doctor import versions

        print_json(versions())
        return 0
    args = build_parser().parse_args(argv)
    _set_up_messages(args.verbose, downloads=args.name == quantize.NAME)
    pressed: list[int] = []
    try:
        with _noting_ctrl_c(pressed):
            args.run(args)
    except EndedElsewhere:
        return 1
    except (QosoraError, OSError) as error:  # the latter of files, each with its name
        if args.verbose:
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone: nobody to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        code = error.code if isinstance(error, QosoraError) else "Q-FILE"
        print(escaped(f"qosora {args.name}: error: {error} [{code}]"), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:
        if args.verbose:
            raise
        if pressed:  # in the midst of a library's own code, which has made another error of it
            print(f"qosora {args.name}: interrupted", file=sys.stderr)
            return 130
        if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: torch may not be imported
            text = f"out of GPU memory; {first_line(error)}"
        elif isinstance(error, MemoryError) or "allocate memory" in str(error):
            text = f"out of memory on this machine; {first_line(error)}"
        else:  # nobody foresaw it
            text = f"{type(error).__name__}: {first_line(error)} (unforeseen: --verbose shows where; please report it)"
        print(escaped(f"qosora {args.name}: error: {text}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"qosora {args.name}: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _noting_ctrl_c(pressed: list[int]) -> Iterator[None]:
    """Put the signal of each Ctrl-C into a list, and raise KeyboardInterrupt as ever."""
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def _set_up_messages(verbose: bool, downloads: bool) -> None:
    """Show our own messages on standard error; other libraries' only on request, but for the bars of `downloads`.

    Characters that a terminal's or a pipe's encoding lacks are shown escaped: an answer is not lost for one of them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Escaped("qosora: %(message)s"))
    logger = logging.getLogger("qosora")
    logger.addHandler(handler)
    # The processes of a run that `accelerate launch` or torchrun began say the same; one is enough
    logger.setLevel(logging.ERROR if os.environ.get("RANK", "0") != "0" else logging.INFO)
    logger.propagate = False
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if not downloads:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else each retry of an offline machine is told
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())

"""Interrupt every command that writes, at random moments: nothing is lost, and nothing half-written is left.

    python tests/campaign/interruptions.py --count 200 --seconds 800 --seed 0    # or: make interruptions

A command is killed (SIGKILL, SIGTERM, Ctrl-C), or runs out of disk or memory, or may not write. What it leaves must not
be there at all or be whole; what it says must be one line; and the same command, run again, must give what an
undisturbed one gives, byte for byte, with nothing beside it. Of two at once, one is refused at once. Prints counts by
command and kind of interruption as JSON, and each fault; exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command line has it, before transformers is loaded

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from campaign.forked import start, warm
from tiny import make_checkpoint, perturbed, sums, write_jsonl

from qosora.base import load_base, quantize
from qosora.config import QosoraConfig

__all__ = ["COMMANDS", "Command", "prepare", "run_once"]

TRAIN = ["--max-steps", "6", "--save-steps", "2", "--batch-size", "2", "--eval-data", "test.jsonl", "--eval-steps", "3"]
#: The user that may not write everywhere, where the campaign's own may.
NOBODY = 65534
#: What differs from run to run: time, memory, and TRL's own count of tokens, which begins anew with each process.
MEASURED = ("num_tokens", "seconds", "runtime", "bytes", "memory", "_per_")


@dataclass(frozen=True)
class Command:
    """A command that makes `out`.

    Args:
        argv: Of the command.
        marker: The file in `out` by which it can be loaded; it must be there only when all is.
        again: What is added when it is run again.
        alone: Whether a second one at the same time is refused; else both may end, with the same.
    """

    argv: tuple[str, ...]
    marker: str
    again: tuple[str, ...] = ()
    alone: bool = True


COMMANDS = {
    "quantize": Command(("quantize", "source", "out", "--rank", "8", "--max-shard-size", "0.00003"), "config.json"),
    "quantize --calibration": Command(
        ("quantize", "source", "out", "--rank", "8", "--calibration", "texts.jsonl"), "config.json"
    ),
    "train": Command(
        ("train", "--model", "base", "--data", "train.jsonl", "--output-dir", "out", *TRAIN),
        "adapter_config.json",
        ("--resume",),
    ),
    "export": Command(("export", "base", "out", "--adapter", "adapter", "--verify"), "config.json"),
    "export --format lora": Command(
        ("export", "base", "out", "--adapter", "adapter", "--format", "lora"), "adapter_config.json"
    ),
    "plan --report": Command(("plan", "source", "--seq-len", "32", "--report", "out"), "memory.html", alone=False),
}


def prepare(folder: Path) -> None:
    """Make a source, a base, an adapter and data."""
    quantize(make_checkpoint(folder / "source", "llama-text"), folder / "base", QosoraConfig(rank=8))
    perturbed(load_base(folder / "base")).save_pretrained(folder / "adapter")
    write_jsonl(folder / "train.jsonl", sums(16))
    write_jsonl(folder / "test.jsonl", sums(6, 100))
    write_jsonl(folder / "texts.jsonl", [{"text": row["prompt"]} for row in sums(40)])
    for path in [folder, *folder.rglob("*")]:  # somebody else may read it
        path.chmod(0o755 if path.is_dir() else 0o644)


# ---- interruptions: each returns what is called in the child first, and what is done to it


@dataclass(frozen=True)
class Interruption:
    """What happens to a command.

    Args:
        limit: Called in the child ahead of it.
        signal: Sent to it, or None.
        after: Seconds until then.
    """

    limit: Callable[[], object] | None = None
    signal: int | None = None
    after: float = 0.0


def _signalled(number: int) -> Callable[[random.Random, float, int], Interruption]:
    return lambda drawn, seconds, _: Interruption(signal=number, after=drawn.uniform(0, 1.05 * seconds))


def _full_disk(drawn: random.Random, _: float, largest: int) -> Interruption:
    """No file grows beyond a size: what a full disk does to whoever writes, at one place of the work or another."""
    size = drawn.randrange(largest)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return Interruption(limit)


def _no_memory(drawn: random.Random, *_: object) -> Interruption:
    more = drawn.randrange(2**12, 2**23)

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))

    return Interruption(limit)


def _read_only(*_: object) -> Interruption:
    def limit() -> None:
        if os.getuid() == 0:
            os.environ["HOME"] = "/nonexistent"
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    return Interruption(limit)


INTERRUPTIONS: dict[str, Callable[[random.Random, float, int], Interruption]] = {
    "SIGKILL": _signalled(signal.SIGKILL),
    "SIGTERM": _signalled(signal.SIGTERM),
    "Ctrl-C": _signalled(signal.SIGINT),
    "disk full": _full_disk,
    "no memory": _no_memory,
    "read-only": _read_only,
}


# ---- a try

_ERROR = re.compile(r"^qosora \w+: error: ", re.MULTILINE)
#: Ctrl-C while Python collects garbage: it goes on as if nothing was.
_IGNORED = re.compile(r"^Exception ignored in.*(\n.*)*?\nKeyboardInterrupt.*", re.MULTILINE)


@dataclass(frozen=True)
class Undisturbed:
    """What a command does when it is left alone: what it makes, in how many seconds, and the largest file's size."""

    files: dict[str, bytes]
    seconds: float
    largest: int


def undisturbed(command: Command, intact: Path) -> Undisturbed:
    """Run a command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        place = _copy(intact, folder)
        begun = time.monotonic()
        status, _, err = start([*command.argv], place).end()
        assert status == 0, err
        files = made(place / "out")
        largest = max(path.stat().st_size for path in (place / "out").rglob("*"))
        return Undisturbed(files, time.monotonic() - begun, largest)


def run_once(command: Command, kind: str, intact: Path, expected: Undisturbed, drawn: random.Random) -> str | None:
    """Interrupt a command once or several times, then run it to its end. Returns what was wrong, if anything."""
    with tempfile.TemporaryDirectory() as folder:
        place = _copy(intact, folder)
        if kind == "read-only" and os.getuid():
            place.chmod(0o555)
        for number in range(drawn.choice((1, 1, 1, 2, 3))):
            how = INTERRUPTIONS[kind](drawn, expected.seconds, expected.largest)
            more = [*command.again, *_replacing(command, place)] if number else []
            child = start([*command.argv, *more], place, how.limit)
            if how.signal is not None:
                time.sleep(how.after)
                child.kill(how.signal)
            if wrong := _wrong_end(kind, *child.end()) or _half_written(command, place, expected):
                return wrong
        place.chmod(0o755)
        status, _, err = start([*command.argv, *command.again, *_replacing(command, place)], place).end()
        if status != 0:
            return f"run again, it ends with {status}: {_shown(err)}"
        if wrong := _difference(made(place / "out"), expected.files):
            return f"run again, {wrong}"
        known = {*(path.name for path in intact.iterdir()), "out", ".out", ".err", ".cache"}
        if left := {path.name for path in place.iterdir()} - known:
            return f"left behind: {', '.join(sorted(left))}"
    return None


def two_at_once(command: Command, intact: Path, expected: Undisturbed, drawn: random.Random) -> str | None:
    """Start a command while it runs. One must be refused in one line, the other must do its work."""
    with tempfile.TemporaryDirectory() as folder:
        place = _copy(intact, folder)
        first = start([*command.argv], place, name="1")
        time.sleep(drawn.uniform(0, 0.5 * expected.seconds))
        ends = [child.end() for child in (first, start([*command.argv], place, name="2"))]
        if not command.alone and [status for status, _, _ in ends] == [0, 0]:
            return _difference(made(place / "out"), expected.files)
        if sorted(status == 0 for status, _, _ in ends) != [False, True]:
            return f"they end with {[status for status, _, _ in ends]}: {[_shown(err) for _, _, err in ends]}"
        _, _, err = next(end for end in ends if end[0] != 0)
        if len(_ERROR.findall(err)) != 1 or "Traceback" in err:
            return f"refused with {_shown(err)}"
        return _difference(made(place / "out"), expected.files)


def _copy(intact: Path, folder: str) -> Path:
    Path(folder).chmod(0o755)
    place = Path(folder) / "place"
    shutil.copytree(intact, place, copy_function=os.link)
    place.chmod(0o755)
    return place


def _replacing(command: Command, place: Path) -> list[str]:
    """Return what a command needs that was interrupted after its end."""
    whole = (place / "out" / command.marker).exists()
    return ["--overwrite"] if whole and command.argv[0] in ("quantize", "export") else []


def _wrong_end(kind: str, status: int | None, out: str, err: str) -> str | None:
    if status is None:
        return f"it hangs: {err[-6000:]}"
    if "Traceback" in _IGNORED.sub("", err):
        return f"a traceback: {_shown(err)}"
    if status in (0, -signal.SIGKILL, -signal.SIGTERM):
        return None
    if kind == "Ctrl-C":
        return None if status == 130 or status == -signal.SIGINT else f"Ctrl-C ends it with {status}: {_shown(err)}"
    if status not in (1, 2) or len(_ERROR.findall(err)) != 1 or "unforeseen" in err:
        return f"it ends with {status}: {_shown(err)}"
    return None


def _half_written(command: Command, place: Path, expected: Undisturbed) -> str | None:
    """Return what is wrong with what an interrupted command has left under the name of its output."""
    if not (place / "out" / command.marker).exists():
        return None
    wrong = _difference(made(place / "out"), expected.files)
    return f"it can be loaded, but {wrong}" if wrong else None


def made(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder, without what differs from run to run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "report.html":  # drawn of a run that is done, with its times
            found[name] = _plain(name, path.read_bytes())
    return found


def _plain(name: str, data: bytes) -> bytes:
    if name in ("result.json", "metrics.jsonl") or name.endswith("trainer_state.json"):
        values = (
            [json.loads(line) for line in data.decode().splitlines()] if name == "metrics.jsonl" else json.loads(data)
        )
        return json.dumps(_without_measured(values), indent=1, sort_keys=True).encode()
    if name == "qosora_manifest.json" and b'"files"' in data:  # hashes of files that are compared themselves
        return json.dumps({k: v for k, v in json.loads(data).items() if k != "files"}, sort_keys=True).encode()
    if name.startswith("checkpoint-") and not name.endswith((".safetensors", ".json")):  # pickled, with the time in it
        return b""
    return data


def _without_measured(value: object) -> object:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(part in k for part in MEASURED)}
        return {k: _without_measured(v) for k, v in kept.items() if k not in ("resumed_from", "device")}
    return [_without_measured(v) for v in value] if isinstance(value, list) else value


def _difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str | None:
    if names := found.keys() ^ expected.keys():
        return f"other files are there: {', '.join(sorted(names))}"
    changed = [name for name in expected if found[name] != expected[name]]
    return "; ".join(f"{name} differs: {_first(found[name], expected[name])}" for name in changed) or None


def _first(found: bytes, expected: bytes) -> str:
    lines = (data.decode(errors="replace").splitlines() for data in (found, expected))
    pairs = zip_longest(*lines, fillvalue="")
    return next((f"{mine.strip()[:60]!r}, not {theirs.strip()[:60]!r}" for mine, theirs in pairs if mine != theirs), "")


def _shown(err: str) -> str:
    return " | ".join(line for line in err.splitlines() if line.strip())[-400:]


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="interruptions to try")
    parser.add_argument("--seconds", type=float, default=800, help="end after these in any case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(COMMANDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun, counts, faults = time.monotonic(), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        intact = Path(folder)
        prepare(intact)
        chosen = {name: command for name, command in COMMANDS.items() if args.only in (None, name)}
        warm(intact, [[*command.argv] for command in chosen.values()])
        alone = {name: undisturbed(command, intact) for name, command in chosen.items()}
        drawn = random.Random(args.seed)
        tries = [(name, kind) for kind in (*INTERRUPTIONS, "two at once") for name in chosen]
        drawn.shuffle(tries)
        for number in range(args.count):
            if time.monotonic() - begun > args.seconds:
                break
            name, kind = tries[number % len(tries)]
            if kind == "two at once":
                wrong = two_at_once(chosen[name], intact, alone[name], drawn)
            else:
                wrong = run_once(chosen[name], kind, intact, alone[name], drawn)
            counts[f"{name}, {kind}: {'fault' if wrong else 'fine'}"] += 1
            if wrong:
                faults += 1
                said = {"command": name, "interruption": kind, "number": number, "wrong": wrong}
                print(json.dumps(said), file=sys.stderr, flush=True)
    summary = {"tried": counts.total(), "faults": faults, "seconds": round(time.monotonic() - begun), **counts}
    print(json.dumps(summary, indent=1, sort_keys=True))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

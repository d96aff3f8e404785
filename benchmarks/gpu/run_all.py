"""All that needs a GPU, in one command that ends within nine minutes.

    python benchmarks/gpu/run_all.py --output FOLDER [--only PART ...]

Each part is a process of its own with a time limit of its own, so that none can take another down with it; the most
important come first. In the folder there are then `summary.json`, which holds the results of all parts and keeps those
of earlier runs that were not run again, and `log.txt`. While a part runs, its results so far lie beside them. Two
tables come last: the figures of what was run, and whether each claim of the README holds, by all that the summary has.
The exit status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from figures import (
    Figure,
    context,
    convert,
    generate,
    kernels,
    layer,
    limits,
    load,
    memory,
    optimizer,
    tests,
    train,
    verdicts,
)

ROOT = Path(__file__).resolve().parent.parent.parent
LEAST = 20  # seconds; with less left, a part is not begun
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
#: Runs a command within some seconds, its output going to a file; returns its exit status, None if time was up.
Launch = Callable[[Sequence[str], Mapping[str, str], float, Path], int | None]


@dataclass(frozen=True)
class Part:
    """Something to run.

    Attributes:
        script: Below the repository's root; its results go to `--output`. Without one, pytest runs.
        options: Of the script. SCRATCH stands for a temporary folder.
        miniature: Options in place of those, to try it out on a CPU.
        seconds: That it may take at most.
        figures: What to show of its results.
        environment: Variables for it.
    """

    script: str
    options: str
    miniature: str
    seconds: int
    figures: Callable[[dict[str, Any]], Iterator[Figure]]
    environment: dict[str, str] = field(default_factory=dict)


TRAINING = "--shapes llama-2-7b llama-3.1-8b --tokens 2048 --batch-sizes 1 4 --checkpointing on --rounds 5"
#: The most important first.
PARTS = {
    # Compiling the kernels' variants takes minutes: their tests come later, in a part of their own.
    "tests": Part("", "--deselect=tests/layers/test_triton_ops.py", "tests/decompose/test_nf4.py", 150, tests),
    "memory": Part(
        "benchmarks/memory.py",
        "--shapes llama-2-7b llama-3.1-8b --tokens 2048 8192 --checkpointing on --steps 2",
        "--checkpointing on",
        130,
        memory,
    ),
    "train": Part("benchmarks/train_step.py", TRAINING, "--checkpointing on", 150, train),
    "limits": Part("benchmarks/gpu/limits.py", "--only trains", "--only trains", 70, limits),
    "context": Part(
        "benchmarks/gpu/limits.py",
        "--only context --seconds 60",
        "--only context",
        160,
        context,
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    ),
    "layer": Part(
        "benchmarks/layer_step.py",
        "--shapes 4096x4096 11008x4096 4096x14336 --tokens 1 2048 8192 --rounds 15",
        "",
        50,
        layer,
    ),
    "kernels": Part("benchmarks/kernels.py", "", "", 60, kernels),
    "kernel-tests": Part("", "tests/layers/test_triton_ops.py", "tests/decompose/test_nf4.py", 120, tests),
    "optimizer": Part("benchmarks/optimizer_step.py", "", "", 45, optimizer),
    "generate": Part("benchmarks/generate.py", "--rounds 3 --new-tokens 16", "", 90, generate),
    "convert": Part(
        "benchmarks/convert.py",
        "--folder SCRATCH --layers 2 --rounds 1 --methods qosora",
        "--folder SCRATCH --layers 1 --rounds 0 --rank 8",
        80,
        convert,
    ),
    "load": Part("benchmarks/load.py", "--shape llama-2-7b:2 --rounds 1", "", 80, load),
    "compiled": Part("benchmarks/train_step.py", f"{TRAINING} --compile", "--checkpointing on --compile", 200, train),
}


def launch(command: Sequence[str], environment: Mapping[str, str], seconds: float, log: Path) -> int | None:
    """Run a command and all that it starts, and end it when time is up."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def command_of(part: Part, miniature: bool, scratch: str, output: Path) -> list[str]:
    """Return what runs a part."""
    options = (part.miniature if miniature else part.options).replace("SCRATCH", scratch).split()
    if not part.script:
        # Other versions of libraries may warn of what ours do not: here that is no failure
        files = [option for option in options if not option.startswith("-")] or sorted(
            str(file.relative_to(ROOT))
            for file in ROOT.glob("tests/**/test_*.py")
            if "mark.gpu" in file.read_text("utf-8")
        )
        flags = [option for option in options if option.startswith("-")]
        pytest = ["-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={output}"]
        return [sys.executable, *pytest, *flags, *files]
    return [sys.executable, part.script, "--output", str(output), *["--miniature"] * miniature, *options]


def run(part: Part, name: str, folder: Path, miniature: bool, seconds: float, start: Launch) -> dict[str, Any]:
    """Run a part; return its entry in the summary."""
    output, log = folder / f"{name}.{'json' if part.script else 'xml'}", folder / "log.txt"
    output.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths), **part.environment}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        command = command_of(part, miniature, scratch, output)
        with log.open("a", encoding="utf-8") as out:
            out.write(f"\n==== {name}: {' '.join(command[1:])}\n")
        status = start(command, environment, seconds, log)
    entry: dict[str, Any] = {
        "command": " ".join(command_of(part, miniature, "FOLDER", Path(output.name))[1:]),
        "seconds": round(time.monotonic() - begin, 1),
        "failure": None if status == 0 else f"exit status {status}: {_last_line(log)}",
        "figures": [],
        "record": {},
    }
    if status is None:
        entry["failure"] = f"time was up after {seconds:.0f} s"
    try:
        entry["record"] = _read(output)
        entry["figures"] = [asdict(figure) for figure in part.figures(entry["record"]["results"])]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        entry["failure"] = entry["failure"] or f"no results that can be read: {error!r}"
    output.unlink(missing_ok=True)
    return entry


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:100]


def _read(output: Path) -> dict[str, Any]:
    """Return a part's results: a benchmark's record, or pytest's report in the same form."""
    if output.suffix == ".json":
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(output).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[outcome].append(f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}")
    return {"results": outcomes}


def rows_of(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Return a part's lines of the table; seconds stand in the first."""
    rows = [
        (f["name"], f["value"], f["wanted"], {True: "ok", False: "missed", None: ""}[f["ok"]]) for f in entry["figures"]
    ]
    if entry["failure"]:
        rows.append(("", entry["failure"], "", "not run" if entry["seconds"] is None else "failed"))
    for index, row in enumerate(rows or [("", "no figures", "", "")]):
        yield (name if not index else "", *row, "" if index or entry["seconds"] is None else f"{entry['seconds']:.0f}")


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows under a head, in columns."""
    rows = [head, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def summary_of(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the summary holds of parts: these, and what they say of the claims."""
    results = {name: entry["record"]["results"] for name, entry in entries.items() if entry.get("record")}
    return {"claims": list(verdicts(results)), "parts": dict(entries)}


def _earlier(summary: Path) -> dict[str, Any]:
    try:
        parts: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, LookupError):
        return {}
    return parts


def main(
    arguments: Sequence[str] | None = None, *, parts: Mapping[str, Part] = PARTS, start: Launch = launch
) -> int:  # fmt: skip
    """Run the parts; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=list(parts), metavar="PART", help=f"of {', '.join(parts)}")
    parser.add_argument("--seconds", type=float, default=530, help="for all together (default: 530)")
    parser.add_argument("--miniature", action="store_true", help="tiny and short on a CPU, to see that all parts run")
    args = parser.parse_args(arguments)
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").unlink(missing_ok=True)
    summary, end, failed = folder / "summary.json", time.monotonic() + args.seconds, False
    entries, rows = _earlier(summary), list[tuple[str, ...]]()
    for name in [name for name in parts if name in (args.only or parts)]:
        left = end - time.monotonic()
        if left < LEAST:
            entry: dict[str, Any] = {"seconds": None, "failure": f"{left:.0f} s were left", "figures": []}
        else:
            print(f"{name} ...", flush=True)
            entry = entries[name] = run(
                parts[name], name, folder, args.miniature, min(left, parts[name].seconds), start
            )
            failed |= entry["failure"] is not None
            temporary = summary.with_suffix(".tmp")
            temporary.write_text(json.dumps(summary_of(entries), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            temporary.replace(summary)
        rows += rows_of(name, entry)
    print(table(("PART", "figure", "measured", "wanted", "", "seconds"), rows))
    claims = [(claim["claim"], claim["verdict"], claim["measured"]) for claim in summary_of(entries)["claims"]]
    print(f"\n{table(('CLAIM', 'verdict', 'measured'), claims)}")
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the part that runs, too
    sys.exit(main())

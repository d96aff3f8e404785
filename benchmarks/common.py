"""What every benchmark writes: one JSON file with its results and all that they depend on.

    {"benchmark", "question", "date", "commit", "versions", "device", "config", "results": {stage: ...}}

The file is written again after each stage, so that a failure late loses nothing; `resume` goes on from it, and keeps
what another process has added to it in the meantime.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: By action, then "seconds" and "ratio": quantiles.
Timings = dict[str, dict[str, dict[str, float]]]
_PACKAGES = ("qosora", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def arguments(parser: argparse.ArgumentParser, **miniature: Any) -> argparse.Namespace:
    """Parse the options, and set the number of threads.

    Args:
        parser: With the script's own options; what all have is added.
        **miniature: The script's defaults under `--miniature`.

    Returns:
        The options, and `device`: the GPU where there is one.
    """
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--resume", action="store_true", help="keep the stages that the output holds")
    parser.add_argument("--miniature", action="store_true", help="tiny and short, to see that the script runs")
    if "--miniature" in sys.argv:
        parser.set_defaults(**miniature)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


class Record:
    """A benchmark's result file.

    Args:
        path: Where to write it.
        benchmark: Name of the script.
        question: What it answers, in a sentence.
        config: Its options; no paths.
        resume: Whether to keep the stages that the file holds already.
    """

    def __init__(
        self, path: str | Path, benchmark: str, question: str, config: Mapping[str, Any], resume: bool
    ) -> None:
        self.path = Path(path)
        if not resume:
            self.path.unlink(missing_ok=True)
        self.head = {
            "benchmark": benchmark,
            "question": question,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit(),
            "versions": versions(),
            "device": device(),
            "config": dict(config),
        }

    def stage(self, name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a stage's result: from the file if it is there, else by running it; print and write it."""
        if name not in self.results():
            start = time.perf_counter()
            result = {**action(), "wall_seconds": round(time.perf_counter() - start, 1)}
            self._write({**self.results(), name: result})
            print(f"{name}: {json.dumps(result)[:2000]}", flush=True)
        return self.results()[name]

    def results(self) -> dict[str, Any]:
        """Return the stages in the file."""
        if not self.path.exists():
            return {}
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))["results"]
        return found

    def _write(self, results: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        text = json.dumps({**self.head, "results": results}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.path)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def device() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def commit() -> str | None:
    """Return the commit of the checkout that this file is in, marked where files differ from it; None outside git."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def in_turns(actions: Mapping[str, Callable[[], object]], rounds: int, *, against: str, warmup: int = 1) -> Timings:
    """Time actions one after the other, round after round, so that what slows the machine down falls on all alike.

    Args:
        actions: What to time, by name. A GPU's work is waited for.
        rounds: How often.
        against: Name of the action that the others are compared with.
        warmup: Rounds before these that do not count.

    Returns:
        For each action its seconds, and their ratio to those of `against` in the same round: quantiles of both.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for count in range(warmup + rounds):
        for name, action in actions.items():
            taken = seconds_of(action)
            if count >= warmup:
                seconds[name].append(taken)
    return {
        name: {
            "seconds": quantiles(found),
            "ratio": quantiles([a / b for a, b in zip(found, seconds[against], strict=True)]),
        }
        for name, found in seconds.items()
    }


def seconds_of(action: Callable[[], object]) -> float:
    """Return how long an action takes, a GPU's work included."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def watched(command: Sequence[str]) -> dict[str, Any]:
    """Run a command and return its wall time and its peaks of memory.

    Raises:
        SystemExit: It failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(command) as process:
        peaks = memory_peaks(process.pid, lambda: process.poll() is None)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"seconds": round(time.perf_counter() - start, 1), **peaks}


def memory_peaks(pid: int, alive: Callable[[], bool]) -> dict[str, int]:
    """Sample a process's resident memory 50 times a second while it is alive, and return the most.

    Anonymous memory is what cannot be dropped and read again: a checkpoint's mapped pages are not in it.
    """
    status = Path(f"/proc/{pid}/status")
    peaks = dict.fromkeys(("RssAnon", "VmHWM"), 0)
    while alive():
        lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
        for key, _, value in (line.partition(":") for line in lines):
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
        time.sleep(0.02)
    return {"peak_anonymous_bytes": peaks["RssAnon"], "peak_resident_bytes": peaks["VmHWM"]}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return count, median and the 10th and 90th percentile, to four digits."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    found = {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}
    return {"count": len(values), **{name: float(f"{value:.4g}") for name, value in found.items()}}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")

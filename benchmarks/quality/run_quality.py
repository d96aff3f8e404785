"""Does it learn as well? Methods x tasks x learning rates x seeds, a file for each run.

    python benchmarks/quality/run_quality.py --work-dir work --minutes 60                      # the demo's task
    python benchmarks/quality/run_quality.py --work-dir work --minutes 600 --workers 2 \
        --tasks gsm8k openbookqa --model gemma-3-270m.Q4_K_M.gguf --data-dir data

Each file in `configs/` is an experiment: what is frozen, what is trained, and learning rates to choose from. On each
task an experiment is first trained briefly at each of its learning rates; that with the lowest validation loss is
taken, and where it is the largest or smallest of them, a further one beyond is tried. An experiment with a single one,
which another has found, is not searched. Then come the trainings that count, one for each seed, which is that of the
examples' order and of what a method draws. What is in `results/quality` already is not run again: the same command goes
on where it stopped. `quality_page.py` makes tables and pictures of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tasks import TASKS, Row, Task, prepare
from trained import Experiment, fit
from transformers import set_seed
from transformers.utils import logging

from common import commit, device, versions  # isort: skip  (tasks.py has made it known)

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "quality"
SEEDS = (0, 1, 2)
#: How far beyond the best learning rate the next is, where the best is the largest or smallest that was tried; and how
#: many such are tried.
BEYOND, FURTHER = 2.0, 3


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: Its name.
        experiment: Its name.
        learning_rate: Largest of the schedule.
        seed: Of the examples' order and of what is drawn.
        steps: How many.
        search: Whether it but finds the learning rate.
    """

    task: str
    experiment: str
    learning_rate: float
    seed: int
    steps: int
    search: bool

    @property
    def file(self) -> str:
        """Where the result is, in the folder of all results."""
        kind = "search" if self.search else f"seed{self.seed}"
        return f"{self.task}/{self.experiment}/{kind}_lr{self.learning_rate:g}_steps{self.steps}.json"


class Results:
    """The files of the runs.

    Args:
        folder: With all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, run: Run) -> dict[str, Any] | None:
        """Return a run's result, if it is there."""
        file = self.folder / run.file
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def put(self, run: Run, result: dict[str, Any]) -> None:
        """Write a run's result."""
        file = self.folder / run.file
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)

    def search_loss(self, run: Run) -> float | None:
        """Return the validation loss that a search ended with; infinite where it diverged."""
        found = self.get(run)
        return None if found is None else math.inf if found["diverged"] else found["losses"][-1]["validation"]

    def learning_rate(self, task: Task, experiment: Experiment) -> tuple[float | None, list[Run]]:
        """Return the best learning rate, or None and the runs that are missing to know it."""
        rates = sorted(experiment.learning_rates)
        if len(rates) == 1:
            return rates[0], []
        while True:
            runs = {rate: Run(task.name, experiment.name, rate, 0, task.search_steps, True) for rate in rates}
            losses = {rate: self.search_loss(run) for rate, run in runs.items()}
            if missing := [runs[rate] for rate in rates if losses[rate] is None]:
                return None, missing
            best = min(rates, key=lambda rate: losses[rate] or math.inf)
            if len(rates) == len(experiment.learning_rates) + FURTHER:
                return best, []
            if best == rates[-1]:
                rates.append(float(f"{best * BEYOND:.2g}"))
            elif best == rates[0]:
                rates.insert(0, float(f"{best / BEYOND:.2g}"))
            else:
                return best, []


def wanted(tasks: dict[str, Task], experiments: list[Experiment], results: Results, seeds: list[int]) -> Iterator[Run]:
    """Give the runs that are missing and can be done now, in their order."""
    for group in sorted({e.group for e in experiments}):
        for task in tasks.values():
            members = [e for e in experiments if e.group == group and task.name in e.tasks]
            finals = []
            for experiment in members:
                rate, missing = results.learning_rate(task, experiment)
                yield from missing
                if rate is not None:
                    finals += [Run(task.name, experiment.name, rate, seed, task.steps, False) for seed in seeds]
            yield from sorted((run for run in finals if results.get(run) is None), key=lambda run: run.seed)


def execute(run: Run, experiment: Experiment, task: Task, work: Path) -> dict[str, Any]:
    """Train, measure, and return the result."""
    start = time.perf_counter()
    set_seed(run.seed)
    model, bits = experiment.model(task, work)
    losses: list[dict[str, float]] = []

    def at(step: int) -> None:
        thirds = {0, run.steps // 3, 2 * run.steps // 3, run.steps}
        if step not in ({run.steps} if run.search else thirds):
            return
        splits = ["validation"] if run.search else ["validation", "test"]
        losses.append({"step": step, **{split: task.loss(model, split) for split in splits}})
        if not run.search and step in (0, run.steps):
            losses[-1]["other"] = task.other_loss(model)

    trained = fit(model, task, run.learning_rate, run.seed, run.steps, at, experiment.update_rate)
    score = {} if run.search or trained.diverged else task.score(task, model, task.splits["test"])
    return {
        **asdict(run),
        "label": experiment.label,
        "base": experiment.base,
        "adapter": experiment.adapter,
        "update_rate": experiment.update_rate,
        "bits_per_weight": round(bits, 3),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": losses,
        "score": score,
        "diverged": trained.diverged,
        "training_losses": [round(loss, 4) if math.isfinite(loss) else None for loss in trained.losses],
        "seconds_per_step": round(trained.seconds, 3),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "commit": commit(),
        "versions": versions(),
        "device": device(),
    }


def work_through(args: argparse.Namespace) -> None:
    """Do runs until none is left or the time is up. Several processes at once do not do the same."""
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    deadline = time.monotonic() + 60 * args.minutes
    results, claims = Results(args.output), args.work_dir / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    tasks = prepare(args.tasks, args.model, args.data_dir, args.work_dir)
    if args.miniature:
        tasks = {name: replace(t, search_steps=3, steps=3, splits=_few(t.splits)) for name, t in tasks.items()}
    experiments = {e.name: e for e in map(Experiment.read, sorted((HERE / "configs").glob("*.json")))}
    chosen = [e for e in experiments.values() if not args.only or e.name in args.only]
    while time.monotonic() < deadline:
        for run in wanted(tasks, chosen, results, args.seeds):
            claim = claims / run.file.replace("/", "_")
            if _claimed(claim):
                result = execute(run, experiments[run.experiment], tasks[run.task], args.work_dir)
                results.put(run, result)
                claim.unlink()
                print(f"{run.file}: {result['losses'][-1:]} {result['score']} {result['wall_seconds']} s", flush=True)
                break
        else:
            return


def _few(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    return {name: rows[:32] for name, rows in splits.items()}


def _claimed(claim: Path) -> bool:
    """Take a run, unless a living process has it."""
    try:
        with claim.open("x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = claim.read_text() or "0"
        if Path("/proc", owner).exists():
            return False
        claim.write_text(str(os.getpid()))
        return True


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Does it learn as well?")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for models and bases; keep it")
    parser.add_argument("--minutes", type=float, required=True, help="no run begins after these")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["demo"])
    parser.add_argument("--only", nargs="+", metavar="EXPERIMENT", help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--model", type=Path, help="Gemma 3 270M, a GGUF file or a folder")
    parser.add_argument("--data-dir", type=Path, help="folder with gsm8k/ and openbookqa/")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--miniature", action="store_true", help="a few steps each, to see that the script runs")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse()
    if args.workers == 1:
        work_through(args)
        return
    prepare(args.tasks, args.model, args.data_dir, args.work_dir)  # once, before the workers need it
    command = [sys.executable, *sys.argv, "--workers", "1"]
    workers = [subprocess.Popen(command) for _ in range(args.workers)]
    if max(worker.wait() for worker in workers):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

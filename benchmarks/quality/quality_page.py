"""Make the page of what is learned, of the runs in `results/quality`: tables, and pictures beside it.

    python benchmarks/quality/quality_page.py    # writes benchmarks/results/quality/README.md and its pictures

Means are over seeds, with 95 % intervals of Student's t. Differences from QLoRA are of runs with one seed, which had
the same examples in the same order.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no window system, no global state

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from page import table  # noqa: E402

RESULTS = HERE.parent / "results" / "quality"
RIVAL = "lora_r16"
#: Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Run = dict[str, Any]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and half the width of its 95 % interval (not a number for one seed)."""

    value: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Take the values of some seeds."""
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.mean(values), _T[min(len(values), len(_T)) - 1] * spread)

    def text(self, digits: int, percent: bool = False) -> str:
        """Write it."""
        factor, sign = (100, " %") if percent else (1, "")
        interval = "" if math.isnan(self.half) else f" ± {factor * self.half:.{digits}f}"
        return f"{factor * self.value:.{digits}f}{interval}{sign}"


@dataclass(frozen=True)
class Method:
    """An experiment on a task.

    Args:
        name: Of its file.
        label: What tables call it.
        finals: Its runs that count, by seed.
        searches: Validation loss by learning rate; infinite where it diverged.
    """

    name: str
    label: str
    finals: dict[int, Run]
    searches: dict[float, float]

    @property
    def run(self) -> Run:
        """Any of its runs that count: what is the same in all."""
        return next(iter(self.finals.values()))

    def last(self, key: str) -> dict[int, float]:
        """Return a loss at the end, by seed."""
        return {seed: run["losses"][-1][key] for seed, run in self.finals.items()}

    @property
    def loss(self) -> Mean:
        """The test loss at the end."""
        return Mean.of(list(self.last("test").values()))

    @property
    def forgotten(self) -> Mean:
        """How much the loss on texts of another kind has risen."""
        return Mean.of([r["losses"][-1]["other"] - r["losses"][0]["other"] for r in self.finals.values()])

    def against(self, rival: Method) -> Mean | None:
        """The relative difference of the loss from a rival's, over the seeds of both."""
        own, other = self.last("test"), rival.last("test")
        shared = sorted(own.keys() & other.keys())
        return Mean.of([own[seed] / other[seed] - 1 for seed in shared]) if shared else None


def read(folder: Path) -> dict[str, dict[str, Method]]:
    """Return the methods by task, those first that have the most trained parameters."""
    found: dict[str, dict[str, Method]] = {}
    for task in sorted(p for p in folder.iterdir() if p.is_dir()):
        methods = []
        for experiment in sorted(p for p in task.iterdir() if p.is_dir()):
            runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(experiment.glob("*.json"))]
            counted = [run for run in runs if not run["search"] and not run["diverged"]]
            finals = {run["seed"]: run for run in counted}
            if len(finals) < len(counted):
                raise SystemExit(f"{experiment}: a seed was trained at several learning rates; keep one of them")
            searches = {
                run["learning_rate"]: math.inf if run["diverged"] else run["losses"][-1]["validation"]
                for run in runs
                if run["search"]
            }
            config = json.loads((HERE / "configs" / f"{experiment.name}.json").read_text(encoding="utf-8"))
            methods.append(Method(experiment.name, config["label"], finals, dict(sorted(searches.items()))))
        done = sorted((m for m in methods if m.finals), key=lambda m: -m.run["trained_parameters"])
        searched = [m for m in methods if not m.finals]
        found[task.name] = {m.name: m for m in [*done, *searched]}
    return found


def results_table(methods: dict[str, Method]) -> str:
    """Return the table of a task, as far as there are results."""
    done = [m for m in methods.values() if m.finals]
    score = next(iter(done[0].run["score"]), "")
    rows = []
    for m in done:
        rows.append(
            [
                m.label,
                f"{m.run['bits_per_weight']:.2f}",
                f"{m.run['trained_parameters']:,}",
                f"{m.run['learning_rate']:g}",
                f"{m.run['losses'][0]['test']:.3f}",
                m.loss.text(3),
                behind(m, methods),
                Mean.of([run["score"][score] for run in m.finals.values()]).text(1, percent=True) if score else "",
                m.forgotten.text(3),
                str(len(m.finals)),
            ]
        )
    head = [
        "",
        "bits",
        "trained",
        "rate",
        "loss before",
        "after",
        "against QLoRA",
        score.replace("_", " "),
        "forgotten",
    ]
    return table([*head, "seeds"], rows, conditions(done))


def behind(method: Method, methods: dict[str, Method]) -> str:
    """Return how much more a method's loss is than the rival's, if that is known."""
    rival = methods.get(RIVAL)
    if rival is None or not rival.finals or method.name == RIVAL:
        return ""
    difference = method.against(rival)
    return "" if difference is None else ("+" if difference.value > 0 else "") + difference.text(1, percent=True)


def conditions(methods: Sequence[Method]) -> str:
    """Return on what the runs of a task were made."""
    runs = [run for m in methods for run in m.finals.values()]
    devices = sorted({run["device"]["cpu"] for run in runs})
    versions = {f"{name} {run['versions'][name]}" for run in runs for name in ("torch", "transformers", "peft")}
    return (
        f"Test loss in nats per token of the answers, after {runs[0]['steps']} steps; mean and 95 % interval over "
        "seeds. Forgotten is the rise of the loss on texts of another kind. Computed in float32 from the values as "
        "stored; "
        f"{', '.join([*devices, *sorted(versions)])}."
    )


def rates_table(methods: dict[str, Method]) -> str:
    """Return the table of validation losses by learning rate."""
    rows = [
        [m.label, ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in m.searches.items())]
        for m in methods.values()
        if m.searches
    ]
    return table(["", "validation loss by learning rate"], rows, "One seed, trained briefly.")


def pictures(task: str, methods: dict[str, Method], folder: Path) -> list[str]:
    """Draw a task's pictures; return their file names."""
    done = [m for m in methods.values() if m.finals]
    figure = Figure(figsize=(13, 9), layout="constrained")
    (parameters, bits), (curves, rates) = figure.subplots(2, 2)
    for axes, key, label in (
        (parameters, "trained_parameters", "trained parameters"),
        (bits, "bits_per_weight", "bits"),
    ):
        for m in done:
            half = 0 if math.isnan(m.loss.half) else m.loss.half
            axes.errorbar(m.run[key], m.loss.value, half, fmt="o", color=colour(m))
            axes.annotate(m.name, (m.run[key], m.loss.value), fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.set_xlabel(label)
        axes.set_ylabel("test loss after training")
    parameters.set_xscale("log")
    front = pareto([(m.run["trained_parameters"], m.loss.value) for m in done])
    parameters.step(*zip(*front, strict=True), where="post", color="grey", linewidth=0.8)
    for m in done:
        losses = [run["losses"] for run in m.finals.values()]
        steps = [point["step"] for point in losses[0]]
        means = [statistics.mean(of_seed[i]["test"] for of_seed in losses) for i in range(len(steps))]
        curves.plot(steps, means, marker="o", markersize=3, label=m.name, color=colour(m))
    curves.set_xlabel("step")
    curves.set_ylabel("test loss")
    curves.legend(fontsize=7, frameon=False)
    for m in methods.values():
        known = {rate: loss for rate, loss in m.searches.items() if math.isfinite(loss)}
        rates.plot(list(known), list(known.values()), marker="o", markersize=3, label=m.name)
    rates.set_xscale("log")
    rates.set_xlabel("learning rate")
    rates.set_ylabel("validation loss of a short training")
    rates.legend(fontsize=7, frameon=False)
    figure.suptitle(task)
    figure.savefig(folder / f"{task}.png", dpi=110)
    return [f"{task}.png"]


def colour(method: Method) -> str:
    """Return the colour of qosora's methods, or of the others."""
    return "#1f6fa8" if method.run["base"]["kind"] == "qosora" else "#d1495b"


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, from the left."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def page(folder: Path) -> str:
    """Write the pictures, and return the page."""
    parts = [
        "# What is learned",
        "",
        "Made by `benchmarks/quality/quality_page.py`; a file for each run is beside it.",
        "",
    ]
    for task, methods in read(folder).items():
        parts += [f"## {task}", ""]
        if any(m.finals for m in methods.values()):
            parts += [results_table(methods)]
            parts += [f"![{task}]({name})\n" for name in pictures(task, methods, folder)]
        parts += [rates_table(methods)]
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    (folder / "README.md").write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    main()

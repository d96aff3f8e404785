"""What runs did, on one page: their curves together, how far the vectors of each have moved, and what they were.

A vector can be read: s says how much each singular direction of a weight counts, o each output. So where a run has
learned is seen by layer and projection, as the change of s relative to the base's, and the mean change of o from one.
"""

from __future__ import annotations

import html
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qosora.checkpoints import ADAPTER_STEM, CheckpointReader, split_source, write_atomically
from qosora.errors import CheckpointError, QosoraError
from qosora.pages import page, picture, png, require_plots, rows
from qosora.training.answers import answers_of
from qosora.training.config import FIGURES, METRICS, RUN_CONFIG, TrainConfig
from qosora.training.run_folder import RESULT, MetricsLog

__all__ = ["movements", "report"]

#: Panels of curves beside a method's figures: what to draw of a line of the metrics, and its name and factor.
_PANELS = {
    "learning_rate": ("learning rate", 1.0), "grad_norm": ("norm of the gradient", 1.0),
    "tokens_per_second": ("tokens a second", 1.0), "peak_memory_bytes": ("peak memory, GiB", 2.0**-30),
}  # fmt: skip
#: Of tables of texts.
_TEXTS = ".texts td,.texts th{text-align:left;vertical-align:top;white-space:pre-wrap;min-width:10em}"
_COLOURS = ("#1f6fa8", "#d1495b", "#6a994e", "#edae49", "#7b2d8b", "#4d4d4d", "#2a9d8f", "#b5651d")
#: Vectors by the end of their names.
_VECTORS = {"s": "s, relative to the base's", "o": "o, from one"}


@dataclass(frozen=True)
class _Run:
    """What is in a run's folder; a run that has not ended has no result."""

    name: str
    folder: Path
    config: TrainConfig
    lines: list[dict[str, Any]]
    result: dict[str, Any]


#: Says what the plan has at the peak of a run's step, of its longest sequence in tokens and its precision.
Planned = Callable[[TrainConfig, int, str], int | None]


def report(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    answers: int = 0,
    planned: Planned | None = None,
) -> Path:
    """Draw one or several runs.

    Args:
        folders: Of the runs.
        output: HTML file; report.html in the folder of a single run by default, else in this folder.
        answers: Prompts of what each run was evaluated on, or else trained on, that are answered by its model before it
            and after it; the model is loaded for that.
        planned: Bytes to show beside those that were measured, such as `qosora.memory.planned_peak`.

    Returns:
        The file.

    Raises:
        CheckpointError: A folder holds no run.
        ConfigError: matplotlib is not installed, or there are no prompts to answer.
    """
    require_plots()
    runs = [_read(Path(folder).expanduser(), folders) for folder in folders]
    where = Path(output).expanduser() if output else (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    parts = [picture(f"Curves of {', '.join(run.name for run in runs)}", _curves(runs)), _results(runs, planned)]
    for run in runs:
        moved = movements(run.folder) if (run.folder / f"{ADAPTER_STEM}.safetensors").is_file() else {}
        if moved:
            parts.append(f"<h2>What moved in {html.escape(run.name)}</h2>")
            parts.append(picture(f"Change of the vectors of {run.name}, by layer and projection", _heat(moved)))
        if answers:
            head = ["prompt", "expected", "before", "after"]
            body = [[a.prompt, a.expected or "", a.before, a.after] for a in answers_of(run.folder, answers)]
            parts.append(f'<h2>Answers of {html.escape(run.name)}</h2><div class="texts">{rows(head, body)}</div>')
    parts.append(_options(runs))
    methods = dict.fromkeys(run.config.method for run in runs)
    title = f"{', '.join(run.name for run in runs)} ({', '.join(methods)})"
    write_atomically(where, page("Training", title, "".join(parts), _TEXTS))
    return where


def _read(folder: Path, all_folders: Sequence[str | Path]) -> _Run:
    file = folder / METRICS
    if not (folder / RUN_CONFIG).is_file() or not file.is_file():
        raise CheckpointError(
            f"{folder} holds no run: it has no {RUN_CONFIG} and {METRICS}, as qosora train writes them"
        )
    names = [Path(f).expanduser().resolve().name for f in all_folders]
    name = folder.resolve().name
    result = folder / RESULT
    return _Run(
        name if names.count(name) == 1 else str(folder),
        folder,
        TrainConfig.load(folder / RUN_CONFIG),
        MetricsLog(file).read(),
        json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {},
    )


# ---- curves


def _curves(runs: Sequence[_Run]) -> bytes:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figures = dict.fromkeys(name for run in runs for name in FIGURES[run.config.method])
    panels = {name: (name, 1.0) for name in figures} | _PANELS
    panels = {key: named for key, named in panels.items() if any(key in line for run in runs for line in run.lines)}
    columns = 2
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(10.5, 2.9 * height), layout="constrained")
    for place, (key, (label, factor)) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(height, columns, place)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        for number, run in enumerate(runs):
            colour = _COLOURS[number % len(_COLOURS)]
            _curve(axes, run, key, factor, colour, run.name if len(runs) > 1 else "training")
            evaluated = [(line["step"], line[f"eval_{key}"]) for line in run.lines if f"eval_{key}" in line]
            if evaluated:
                said = f"{run.name}, held-out" if len(runs) > 1 else "held-out"
                axes.plot(*zip(*evaluated, strict=True), "o--", color=colour, label=said, markersize=4, linewidth=1)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8)
    return png(figure)


def _curve(axes: Any, run: _Run, key: str, factor: float, colour: str, label: str) -> None:
    """Draw a curve; a noisy one faintly, with its running mean over a twentieth of the steps."""
    points = [(line["step"], factor * line[key]) for line in run.lines if key in line]
    if not points:
        return
    steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    width = len(values) // 20
    smooth = width > 1 and key not in ("learning_rate", "peak_memory_bytes")
    axes.plot(steps, values, color=colour, alpha=0.25 if smooth else 1, linewidth=1, label=None if smooth else label)
    if smooth:
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        middle = (width - 1) // 2
        axes.plot(steps[middle : middle + len(mean)], mean, color=colour, label=label, linewidth=1.6)


# ---- what was learned


def movements(folder: str | Path) -> dict[str, dict[tuple[str, int], float]]:
    """Return how far an adapter's vectors are from where they began.

    Args:
        folder: Of the adapter. Without its base, which has the singular values, only o is compared.

    Returns:
        For "s" and "o", by projection and layer (-1 outside layers): the norm of the change of s relative to that of
        the base's, and the root of the mean square of o - 1. Of a layer's experts the mean.
    """
    found: dict[str, dict[tuple[str, int], list[float]]] = {name: defaultdict(list) for name in _VECTORS}
    with ExitStack() as stack:
        adapter = stack.enter_context(CheckpointReader(Path(folder), ADAPTER_STEM))
        base = _base_of(folder, stack)
        for key in adapter.names():
            name, _, vector = key.removeprefix("base_model.model.").rpartition(".osora_")
            if vector == "o":
                moved = _rms(adapter.tensor(key) - 1)
            elif vector == "s" and base is not None and f"{name}.s" in base:
                before = base.tensor(f"{name}.s").float()
                moved = _rms(adapter.tensor(key) - before) / max(_rms(before), 1e-30)
            else:
                continue
            found[vector][_projection(name)].append(moved)
    return {
        vector: {place: sum(values) / len(values) for place, values in places.items()}
        for vector, places in found.items()
        if places
    }


def _rms(values: torch.Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def _base_of(folder: str | Path, stack: ExitStack) -> CheckpointReader | None:
    """Return a reader of an adapter's base, if it is here."""
    try:
        source, _ = split_source(str(folder))
        return stack.enter_context(CheckpointReader(source)) if Path(source).is_dir() else None
    except (QosoraError, OSError):
        return None


def _projection(name: str) -> tuple[str, int]:
    """Return what a layer is called in every decoder layer, and in which it is."""
    match = re.search(r"\.(\d+)\.", name)
    if not match:
        return name, -1
    return re.sub(r"\.\d+(?=\.|$)", ".*", name[match.end() :]), int(match[1])


def _heat(moved: Mapping[str, Mapping[tuple[str, int], float]]) -> bytes:
    from matplotlib.figure import Figure

    sizes = [len({projection for projection, _ in places}) for places in moved.values()]
    figure = Figure(figsize=(10.5, sum(1.0 + 0.32 * size for size in sizes)), layout="constrained")
    for place, (vector, places) in enumerate(moved.items(), 1):
        projections = list(dict.fromkeys(projection for projection, _ in places))
        layers = sorted({layer for _, layer in places})
        values = np.array([[places.get((p, layer), np.nan) for layer in layers] for p in projections])
        axes = figure.add_subplot(len(moved), 1, place)
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
        axes.set_yticks(range(len(projections)), projections, fontsize=8)
        every = -(-len(layers) // 32)
        axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
        axes.set_xlabel("layer", fontsize=9)
        axes.set_title(f"change of {_VECTORS[vector]}", loc="left", fontsize=10)
        figure.colorbar(image, ax=axes, pad=0.01)
    return png(figure)


# ---- tables


def _results(runs: Sequence[_Run], planned: Planned | None) -> str:
    wanted = (
        "steps", "examples", "supervised_tokens", "trained_parameters", "adapter_bytes", "train_loss",
        "eval_loss_before", "eval_loss_after", "precision", "wall_seconds", "peak_memory_bytes", "processes",
    )  # fmt: skip
    body = [[name.replace("_", " "), *(_shown(run.result.get(name)) for run in runs)] for name in wanted]
    if planned is not None:
        peaks = [_planned(run, planned) for run in runs]
        body.append(["planned: bytes of tensors at the peak, without the program", *map(_shown, peaks)])
    figures = dict.fromkeys(name for run in runs for name in run.result.get("figures", {}))
    for name in figures:
        pairs = [run.result.get("figures", {}).get(name) for run in runs]
        body.append([name, *(" → ".join(map(_shown, pair)) if pair else "" for pair in pairs)])
    if not any(run.result for run in runs):
        return "<p>not finished yet</p>"
    return rows(["", *(run.name for run in runs)], body)


def _planned(run: _Run, planned: Planned) -> int | None:
    longest, precision = run.result.get("longest"), run.result.get("precision")
    return planned(run.config, longest, precision) if longest and precision else None


def _options(runs: Sequence[_Run]) -> str:
    """Return the options that are not as they are by default, or not the same in all runs."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    body: list[Iterable[str]] = []
    for name, default in defaults.items():
        values = [getattr(run.config, name) for run in runs]
        if any(value != values[0] or value not in (default, [], {}) for value in values):
            body.append([name, *(json.dumps(value) for value in values)])
    return "<h2>Options</h2>" + rows(["", *(run.name for run in runs)], body)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)

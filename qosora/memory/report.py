"""Pictures of a step's memory, from a plan or a measurement: PNG files, one HTML file, a snapshot for memory_viz.

    steps      live bytes over the step's allocations, stacked by category, phases marked
    peak       the categories at the peak; qosora and QLoRA, planned and measured, as far as they are known

The HTML file holds the pictures and needs no network. The snapshot opens in https://pytorch.org/memory_viz, "Active
Memory Timeline"; it is a pickle, as that page wants it, of lists, dicts, numbers and texts.
"""

from __future__ import annotations

import html
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qosora.checkpoints import write_atomically
from qosora.memory.plan import OUTSIDE, Plan, Usage
from qosora.memory.profile import Measurement
from qosora.memory.tracer import CATEGORIES, Event, category_of
from qosora.pages import page, picture, png, require_plots
from qosora.pages import rows as page_rows

__all__ = ["Timeline", "report", "snapshot", "timeline"]

#: In the order of stacking: what lasts in blues and greys, what a step makes in warm colours.
_COLOURS = {
    "base residual": "#1f4e79", "layers in use": "#2e75b6", "embeddings and head": "#4a7fb0", "factors": "#8db4d6",
    "norms, biases, buffers": "#c9d9e8", "adapter": "#2f7d5b", "gradients": "#6fb08f", "optimizer state": "#b5d8c4",
    "batch": "#999999", "saved activations": "#e08e2b", "layer temporaries": "#c8442f", "logits and loss": "#8e44ad",
    "workspace": "#f2c14e", "rounding": "#dddddd", "cuBLAS workspaces": "#f7dc9b", "not traced": "#f7dc9b",
    "optimizer state, paged": "#d5e8d4",
    "allocator overhead": "#bbbbbb", "CUDA context": "#777777",
}  # fmt: skip
_ALT = {
    "steps": "Live bytes over a training step, stacked by category",
    "peak": "Bytes at the peak, by category",
}


@dataclass(frozen=True)
class Timeline:
    """Live bytes after each allocation of a step.

    Attributes:
        live: Bytes at each point, by category.
        phases: Name and first point of each phase.
    """

    live: dict[str, list[int]]
    phases: list[tuple[str, int]]

    @property
    def totals(self) -> list[int]:
        """Bytes at each point."""
        return [sum(column) for column in zip(*self.live.values(), strict=True)]


def timeline(events: Sequence[Event], points: int = 2000) -> Timeline:
    """Return the live bytes over a step, with the highest of each stretch where there are more than `points`."""
    live: Counter[Any] = Counter()
    rows: list[tuple[str, dict[str, int], int]] = []
    for event in events:
        live[event.key] += event.nbytes
        found: Counter[str] = Counter()
        for key, nbytes in live.items():
            if nbytes:
                found[category_of(key, event.site)] += nbytes
        rows.append((event.site.phase, dict(found), sum(live.values())))
    stretch = max(1, -(-len(rows) // points))
    chosen = [max(rows[i : i + stretch], key=lambda row: row[2]) for i in range(0, len(rows), stretch)]
    chosen = [row for row in chosen if row[0] != "setup"]
    phases = [(row[0], i) for i, row in enumerate(chosen) if i == 0 or row[0] != chosen[i - 1][0]]
    present = [name for name in CATEGORIES if any(name in row[1] for row in chosen)]
    return Timeline({name: [row[1].get(name, 0) for row in chosen] for name in present}, phases)


def snapshot(events: Sequence[Event], path: str | Path) -> None:
    """Write a step's allocations as a snapshot that PyTorch's memory_viz opens."""
    trace, addresses, top = [], {}, 0
    for time, event in enumerate(events):
        if event.nbytes > 0:
            addresses[event.number] = top
            top += event.nbytes
        where = event.site.module or "step"
        layer = f", layer {event.site.layer}" if event.site.layer >= 0 else ""
        names = (event.op or ("registered" if event.nbytes > 0 else "freed"), where + layer, event.site.phase)
        frames = [{"filename": category_of(event.key, event.site), "line": 0, "name": name} for name in names]
        entry = {"addr": addresses[event.number], "size": abs(event.nbytes), "stream": 0, "time_us": time}
        actions = ["alloc"] if event.nbytes > 0 else ["free_requested", "free_completed"]
        trace += [{**entry, "action": action, "frames": frames} for action in actions]
    write_atomically(path, pickle.dumps({"segments": [], "device_traces": [trace]}))


def report(found: Plan | Measurement, events: Sequence[Event], folder: str | Path) -> list[Path]:
    """Draw a plan or a measurement.

    Args:
        found: What to draw.
        events: Of the step: `Measurement.events`, or those of `qosora.memory.plan.events`.
        folder: For `steps.png`, `peak.png`, `memory.html` and `snapshot.pickle`; made if need be.

    Returns:
        The files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_plots()
    import matplotlib

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    columns = _columns(found)
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        pictures = {"steps": _steps(found, timeline(events)), "peak": _peak(found, columns)}
    for name, data in pictures.items():
        write_atomically(folder / f"{name}.png", data)
    snapshot(events, folder / "snapshot.pickle")
    write_atomically(folder / "memory.html", _page(found, pictures, columns))  # last: with it, all is there
    return [folder / name for name in (*(f"{name}.png" for name in pictures), "memory.html", "snapshot.pickle")]


def _columns(found: Plan | Measurement) -> dict[str, Usage]:
    if isinstance(found, Plan):
        return {"qosora, planned": found.usage} | ({"QLoRA r=16, planned": found.qlora} if found.qlora else {})
    # Both as CUDA counts: to the traced tensors comes what the tracer did not see, of the plan goes what CUDA does not.
    unseen = found.measured_bytes - found.live.total_bytes
    rows = found.live.rows | ({"not traced": unseen} if unseen > 0 else {})
    columns = {"measured": replace(found.live, rows=rows, total_bytes=found.measured_bytes)}
    if found.planned is not None:
        rows = {name: value for name, value in found.planned.rows.items() if name not in OUTSIDE}
        columns["planned"] = replace(found.planned, rows=rows, total_bytes=found.planned.allocated_bytes)
    return columns


def _title(found: Plan | Measurement) -> str:
    batch, options = found.batch, found.options
    if isinstance(found, Plan):
        how = "planned" if found.card.memory_bytes is None else f"planned for {found.card.name}"
    else:
        how = f"measured on {found.device}"
    return (
        f"{Path(found.model).name}, {batch.size} × {batch.length} tokens, {options.precision}, "
        f"checkpointing {'on' if options.gradient_checkpointing else 'off'}, {how}"
    )


def _steps(found: Plan | Measurement, line: Timeline) -> bytes:
    """Live bytes over a step, stacked."""
    figure, axes = _figure(10.5, 5.2)
    unit, factor = _unit(max(line.totals))
    steps, edges = _across(line)
    order = [name for name in _COLOURS if name in line.live and max(line.live[name]) >= 1e-3 * max(line.totals)]
    bands = [[value / factor for value in [*line.live[name], line.live[name][-1]]] for name in order]
    axes.stackplot(steps, *bands, labels=order, colors=[_COLOURS[name] for name in order], step="post")
    top = max(line.totals)
    at = steps[line.totals.index(top)]
    axes.annotate(
        f"peak {top / factor:.2f} {unit}", (at, top / factor), (at + 0.04 * edges[-1], 1.06 * top / factor),
        arrowprops={"arrowstyle": "-", "color": "#333333"},
    )  # fmt: skip
    axes.set_ylim(0, 1.2 * top / factor)
    axes.set_xlim(0, edges[-1])
    for (name, _), (start, end) in zip(line.phases, pairwise(edges), strict=True):
        axes.axvline(start, color="#333333", lw=0.7, ls=":", zorder=0)
        axes.text((start + end) / 2, 1.14 * top / factor, name, ha="center", va="bottom", fontsize=9)
    axes.set_xticks([])
    axes.set_xlabel("one training step, allocation by allocation; short phases are widened")
    axes.set_ylabel(f"live tensors, {unit}")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes.set_title(_title(found), loc="left", fontsize=11)
    return png(figure)


def _across(line: Timeline) -> tuple[list[float], list[float]]:
    """Return where points and phases begin, and end, with room for each phase's name."""
    starts = [start for _, start in line.phases] + [len(line.totals)]
    points, edges = [], [0.0]
    for start, end in pairwise(starts):
        width = max(end - start, 0.09 * len(line.totals))
        points += [edges[-1] + width * i / (end - start) for i in range(end - start)]
        edges.append(edges[-1] + width)
    return [*points, edges[-1]], edges


def _peak(found: Plan | Measurement, columns: Mapping[str, Usage]) -> bytes:
    """The categories at the peak, a bar for each method or source."""
    figure, axes = _figure(10.5, 1.9 + 0.9 * len(columns))
    top = max(usage.total_bytes for usage in columns.values())
    unit, factor = _unit(top)
    named = {name for usage in columns.values() for name, value in usage.rows.items() if value >= 2e-3 * top}
    order = [name for name in _COLOURS if name in named]
    for row, usage in enumerate(columns.values()):
        left = 0.0
        for name in order:
            width = usage.rows.get(name, 0) / factor
            axes.barh(row, width, left=left, color=_COLOURS[name], label=name if row == 0 else None, height=0.6)
            if width > 0.06 * top / factor:
                ink = _ink(_COLOURS[name])
                axes.text(left + width / 2, row, f"{width:.2f}", ha="center", va="center", color=ink, fontsize=9)
            left += width
        axes.text(left + 0.01 * top / factor, row, f"{usage.total_bytes / factor:.2f} {unit}", va="center")
    axes.set_yticks(range(len(columns)), list(columns))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.13 * top / factor)
    axes.set_xlabel(f"at the peak, {unit}")
    figure.legend(loc="outside lower center", ncol=4, frameon=False)
    axes.set_title(_title(found), loc="left", fontsize=11)
    return png(figure)


def _ink(background: str) -> str:
    """Return the colour of text that can be read on another, by its luma."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _unit(top: int) -> tuple[str, int]:
    return ("GiB", 2**30) if top >= 2**29 else ("MiB", 2**20)


def _page(found: Plan | Measurement, pictures: Mapping[str, bytes], columns: Mapping[str, Usage]) -> str:
    """One HTML file with everything in it."""
    names = [name for name in _COLOURS if any(name in usage.rows for usage in columns.values())]
    rows = {name: [usage.rows.get(name, 0) for usage in columns.values()] for name in names}
    rows["in all"] = [usage.total_bytes for usage in columns.values()]
    head = ["", *(f"{name}, MiB" for name in columns)]
    table = page_rows(head, ([name, *(f"{v / 2**20:,.1f}" for v in values)] for name, values in rows.items()))
    images = "".join(picture(_ALT[name], data) for name, data in pictures.items())
    notes = found.assumptions if isinstance(found, Plan) else ()
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    last = "tr:last-child{font-weight:bold}"
    return page("Memory of a training step", _title(found), f"{images}{table}<ul>{listed}</ul>", last)

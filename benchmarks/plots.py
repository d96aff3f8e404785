"""Draw benchmarks/results/layer_step_cpu.png: time of a layer's step relative to frozen NF4, over tokens, per method.

python benchmarks/plots.py [RESULT.json]    # any result of layer_step.py; the picture goes beside it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no window system, no global state
from page import conditions
from speed_tables import layer_times

RESULT = Path(__file__).parent / "results" / "layer_step_cpu.json"
#: Label and look of each method.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "qosora-64": ("qosora, r = 64", {"color": "#8fbcdb", "marker": "o"}),
    "qosora-128": ("qosora, r = 128", {"color": "#1f6fa8", "marker": "o", "linewidth": 2.5}),
    "qosora-256": ("qosora, r = 256", {"color": "#123f61", "marker": "o"}),
    "lora": ("LoRA", {"color": "#d1495b", "marker": "s"}),
    "dora": ("DoRA", {"color": "#edae49", "marker": "^"}),
    "vera": ("VeRA", {"color": "#6a994e", "marker": "v"}),
}
#: The ratio at which the pictures end; a method that is always above is named with its range.
TOP = 2.0


def layer_step(found: dict[str, Any]) -> Figure:
    """Return the picture, with a panel for each model whose shapes were measured."""
    times = {model: by_tokens for model in found["config"]["layers"] if (by_tokens := layer_times(found, model))}
    ratios = {
        method: {model: [t[method] / t["nf4"] for t in by_tokens.values()] for model, by_tokens in times.items()}
        for method in METHODS
    }
    figure = Figure(figsize=(4.4 * len(times) + 2.2, 4), layout="constrained")
    panels = figure.subplots(1, len(times), sharey=True, squeeze=False)[0]
    for axes, (model, by_tokens) in zip(panels, times.items(), strict=True):
        for method, (label, look) in METHODS.items():
            every = [ratio for of_model in ratios[method].values() for ratio in of_model]
            above = f"\n({min(every):.1f} to {max(every):.1f}: above)" if min(every) > TOP else ""
            axes.plot(list(by_tokens), ratios[method][model], label=label + above, markersize=5, **look)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(by_tokens), [f"{tokens:,}" for tokens in by_tokens], fontsize=8)
        axes.set_xlabel("tokens")
        axes.set_title(model, fontsize=10)
    drawn = [r for of_method in ratios.values() for of_model in of_method.values() for r in of_model if r <= TOP]
    panels[0].set_ylim(min([0.95, *(r - 0.05 for r in drawn)]), max([1.05, *(r + 0.05 for r in drawn)]))
    panels[0].set_ylabel("time, frozen NF4 = 1")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    where = conditions(found, "", "torch", "bitsandbytes", threads=True).partition(";")[0]
    figure.suptitle(f"Forward and backward of a decoder layer's linear layers\n{where}", fontsize=9)
    return figure


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    result = parser.parse_args().result
    layer_step(json.loads(result.read_text(encoding="utf-8"))).savefig(result.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()

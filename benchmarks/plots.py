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
    "plain": ("16-bit weight", {"color": "#999999", "marker": ".", "linestyle": "--"}),
}


def layer_step(found: dict[str, Any]) -> Figure:
    """Return the picture, with a panel for each model whose shapes were measured."""
    times = {model: by_tokens for model in found["config"]["layers"] if (by_tokens := layer_times(found, model))}
    figure = Figure(figsize=(5.2 * len(times), 4.2), layout="constrained")
    panels = figure.subplots(1, len(times), sharey=True, squeeze=False)[0]
    for axes, (model, by_tokens) in zip(panels, times.items(), strict=True):
        for method, (label, look) in METHODS.items():
            if all(method in found_here for found_here in by_tokens.values()):
                ratios = [found_here[method] / found_here["nf4"] for found_here in by_tokens.values()]
                axes.plot(list(by_tokens), ratios, label=label, markersize=5, **look)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(list(by_tokens), [f"{tokens:,}" for tokens in by_tokens])
        axes.set_xlabel("tokens")
        axes.set_title(model)
        axes.yaxis.set_major_formatter("{x:.2g}")
    panels[0].set_ylabel("time, frozen NF4 = 1")
    panels[-1].legend(frameon=False, fontsize=8)
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

"""Write docs/support.md of what `run_models.py` found.

python benchmarks/models/models_page.py            # --check: say whether it is up to date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "models.json", ROOT / "docs" / "support.md"
KINDS = {
    "causal": "language models",
    "classifier": "classifiers of texts",
    "tagger": "taggers of tokens",
    "seq2seq": "encoder-decoders",
    "speech": "speech to text",
    "vision": "images and text",
}
STAGES = ("quantize", "load", "train", "adapter", "export")


def group(model: dict[str, Any]) -> str:
    """Return how far a model came, as the head of a column."""
    passed = model["passed"]
    if "lora" in passed:
        return "everything"
    if "export" in passed:
        return "all but LoRA"
    return "stops before" if "build" in passed else "not tried"


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for name, model in results["models"].items():
        kind, _, model_type = name.partition("/")
        kinds[kind][model_type] = model
    groups = ("everything", "all but LoRA", "stops before", "not tried")
    lines = [
        "# What each architecture of transformers can be taken through",
        "",
        "Made by `benchmarks/models/models_page.py` of a run of `run_models.py`, which takes a tiny random model of",
        "every architecture that transformers lists through converting, loading, training with and without",
        "checkpointing, the adapter, both exports of merged weights, and a LoRA in PEFT that gives the same outputs.",
        "Not tried is what cannot be built so small without care that nobody has taken yet, or needs a package that",
        "was not there.",
        "",
        "| kind | architectures | " + " | ".join(groups) + " |",
        "|---|---:|" + "---:|" * len(groups),
    ]
    for kind, models in kinds.items():
        counts = [sum(group(m) == g for m in models.values()) for g in groups]
        lines.append(f"| {KINDS[kind]} | {len(models)} | " + " | ".join(map(str, counts)) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += ["", f"{results['device']['cpu']}, {versions}."]
    elsewhere = {name: m["versions"] for name, m in results["models"].items() if "versions" in m}
    for other in {json.dumps(version): version for version in elsewhere.values()}.values():
        named = ", ".join(sorted(name for name, version in elsewhere.items() if version == other))
        lines += ["", f"With {', '.join(f'{name} {version}' for name, version in other.items())}: {named}."]
    for kind, models in kinds.items():
        lines += ["", f"## {KINDS[kind][0].upper()}{KINDS[kind][1:]}", ""]
        lines += wrapped("Everything: ", (name for name, m in models.items() if group(m) == "everything"))
        kept = [name for name, m in models.items() if m.get("checkpointed", "yes") not in ("yes", "not supported")]
        if kept:
            lines += ["", *wrapped("Without checkpointing alone, as with LoRA:", kept)]
        rows = [(name, m) for name, m in models.items() if group(m) != "everything"]
        lines += ["", "| | comes through | what stops it |", "|---|---|---|"]
        for name, model in sorted(rows, key=lambda row: (groups.index(group(row[1])), row[0])):
            passed = [stage for stage in STAGES if stage in model["passed"]]
            reason = model.get("refused") or model.get("failed") or ""
            lines.append(f"| {name} | {', '.join(passed) or '-'} | {reason.partition(': ')[2].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def wrapped(head: str, names: Iterable[str]) -> list[str]:
    """Return names in lines of up to 120 letters."""
    lines = [head.rstrip()]
    for name in sorted(names):
        if len(lines[-1]) + len(name) > 116:
            lines.append("")
        lines[-1] = f"{lines[-1]} {name},".strip()
    return [*lines[:-1], lines[-1].rstrip(",") + "."]


def main() -> int:
    """Write or check the page."""
    text = page(json.loads(RESULTS.read_text(encoding="utf-8")))
    if "--check" in sys.argv:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE.name} is not what the results make it: run {Path(__file__).name}", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the tables of README and docs are made of."""

from __future__ import annotations

from typing import Any

#: Packages whose versions a comparison with QLoRA names.
QLORA = ("torch", "peft", "bitsandbytes")


def gib(size: int) -> str:
    """Return bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def count(number: int, noun: str) -> str:
    """Return "1 layer", "2 layers"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def milliseconds(seconds: float) -> str:
    """Return a time in ms, to three digits."""
    return f"{seconds * 1e3:{'.3g' if seconds < 0.1 else ',.0f'}} ms"


def mib(size: int) -> str:
    """Return bytes in MiB."""
    return f"{size / 2**20:.1f} MiB"


def conditions(found: dict[str, Any], file: str, *packages: str, threads: bool = False) -> str:
    """Return on what and when it was measured, and where the figures are."""
    device = found["device"]["gpu"] or found["device"]["cpu"]
    cores = [count(found["device"]["threads"], "thread")] if threads and not found["device"]["gpu"] else []
    versions = [f"{name} {found['versions'][name]}" for name in packages]
    return f"{', '.join([device, *cores, *versions, found['date']])}; [all figures](benchmarks/results/{file})."


def table(head: list[str], rows: list[list[str]], note: str) -> str:
    """Return a table whose numbers stand on the right, and a paragraph below it."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", note, ""])

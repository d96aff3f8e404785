"""A training step's budget of launches: a count, which no machine changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS: dict[str, Any] = json.loads((BENCHMARKS / "results" / "launches.json").read_text(encoding="utf-8"))["results"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import launches

    return launches


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
def test_no_more_than_was_recorded_nor_than_qlora(launches: Any, checkpointing: bool):
    suffix = "checkpointed" if checkpointing else "kept"
    found = {
        method: launches.of_a_layer(method, checkpointing=checkpointing).total()
        for method in ("qosora", "qosora-plain", "qlora")
    }
    for method, count in found.items():
        if method != "qlora":
            assert count <= RESULTS[f"{method}_{suffix}"]["launches"], f"{method}: run benchmarks/launches.py and see"
    if checkpointing:  # which is the default
        assert found["qosora"] <= found["qlora"] <= 307
    else:  # 14 launches are the multiplications by c
        assert found["qosora"] <= 1.05 * found["qlora"]

"""The verdicts of `benchmarks/gpu/run_all.py` on the README's claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, beside those that it and the benchmarks import."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    import run_all

    return run_all


def told(run_all: Any, results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {found["claim"]: (found["verdict"], found["measured"]) for found in run_all.verdicts(results)}


def test_nothing_was_run(run_all: Any):
    assert set(told(run_all, {}).values()) == {("not run", "")}


def test_every_claim_is_decided_by_a_part(run_all: Any):
    from figures import CLAIMS

    assert {part for claim in CLAIMS for part in claim.parts} <= set(run_all.PARTS)
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)


def test_verdicts(run_all: Any):
    ratio = {"qosora": {"ratio": {"median": 0.5}}}
    over = [
        {"over_qlora": {"qosora": {"tokens_per_second": t, "peak_bytes": p}}} for t, p in ((0.9, 0.97), (1.1, None))
    ]
    found = told(
        run_all,
        {
            "tests": {"passed": ["a::test_paged", "a::test_b"], "failed": ["a::test_c"], "skipped": []},
            "kernel-tests": {"passed": [], "failed": [], "skipped": ["a::test_d"]},
            "limits": {"llama-2-7b_1x2048_8GiB": {"fits": True}, "llama-2-7b_4x2048_24GiB": {"fits": False}},
            "context": {"probe_llama-3.1-8b_8192": {"fits": True}, "context_llama-3.1-8b": {"longest": 90_112}},
            "memory": {"measured_llama-2-7b_2048_checkpointed": {"qosora": {"planned_over_measured": 0.96}}},
            "train": dict(enumerate(over)),
            "generate": {"llama-2-7b_1": {"decode": ratio}},  # time was up before the prefill's
            "kernels": {"dequantize": {"device_speedup": 1.5}, "add_low_rank_16_8x8": {"device_speedup": 0.5}},
        },
    )
    assert found == {
        "all tests marked gpu pass": ("fails", "share that passes: 0.66667"),
        "optimizer states are paged, and after resume": ("holds", "share that passes: 1"),
        "trains a 7B within 8 GiB": ("holds", "share that trains: 1"),
        "trains a 7B and an 8B within 24 GiB, batch 4": ("fails", "share that trains: 0"),
        "80,000 tokens of an 8B within 24 GiB": ("holds", "longest: 90,112"),
        "plans are within 3 %": ("fails", "planned over measured: 0.96"),
        "less memory than QLoRA": ("holds", "peak over QLoRA's: 0.97"),
        "at least QLoRA's tokens/s": ("fails", "over QLoRA's: 0.9 to 1.1"),
        "decodes at least as fast as LoRA on NF4": ("holds", "over LoRA's: 2"),
        "reads prompts at least as fast": ("not run", ""),
        "the fused kernels are faster": ("holds", "over the plain code's speed: 1.5"),
    }


def test_a_summary_has_them_and_the_last_table_shows_them(
    run_all: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "summary.json").write_text(
        json.dumps({"parts": {"limits": {"record": {"results": {"llama-2-7b_1x2048_8GiB": {"fits": True}}}}}})
    )
    assert run_all.main(["--output", str(tmp_path), "--seconds", "1"]) == 0  # no time for any part
    lines = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert lines[0].split() == ["CLAIM", "verdict", "measured"]
    assert "trains a 7B within 8 GiB                      holds    share that trains: 1" in lines
    assert sum("not run" in line for line in lines) == len(lines) - 2


def test_the_committed_summary_says_what_its_figures_say(run_all: Any):
    found = json.loads((BENCHMARKS / "results" / "gpu" / "summary.json").read_text(encoding="utf-8"))
    assert found == run_all.summary_of(found["parts"])

"""The README's tables are what the committed results make them, and the benchmarks run, in miniature."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = ("layer_step", "optimizer_step", "generate", "load", "plans", "growth", "mixture_step", "shares")
#: Runs some scripts in one process, since importing takes longer than they do: a JSON list of argv.
RUN = """
import json, os, runpy, sys
for argv in json.loads(sys.argv[1]):
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["tables.py", "models/models_page.py"])
def test_the_documentation_says_what_was_measured(script: str) -> None:
    run = subprocess.run([sys.executable, str(BENCHMARKS / script), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_benchmarks_run_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / f"{name}.json" for name in NAMES}
    scripts = [
        [str(next(BENCHMARKS.rglob(f"{name}.py"))), "--output", str(file), "--miniature"]
        for name, file in files.items()
    ]
    scripts.append([str(BENCHMARKS / "plots.py"), str(files["layer_step"])])
    run = subprocess.run([sys.executable, "-c", RUN, json.dumps(scripts)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "layer_step.png").read_bytes().startswith(b"\x89PNG")
    found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    for name, result in found.items():
        assert set(result) == {
            "benchmark", "question", "date", "commit", "versions", "device", "config", "results",
        }  # fmt: skip
        assert result["benchmark"] == name
        assert result["results"]
        for where, value in _numbers(result["results"], name):
            least = 0 if "paged_bytes" in where or "wall_seconds" in where else sys.float_info.min
            assert least <= value < math.inf, f"{where} is {value}"
    _check_layer_step(found["layer_step"])
    _check_optimizer_step(found["optimizer_step"]["results"])
    _check_generate(found["generate"]["results"])
    _check_load(found["load"]["results"]["load"])

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    for name, result in found.items():
        file, make = tables.TABLES[name]
        lines = make(result, file).split("\n")
        columns = {line.count("|") for line in lines if line.startswith("|")}
        assert len(columns) == 1, f"{name}: rows of different lengths"
        assert lines[-2].endswith(f"[all figures](benchmarks/results/{file}).")
        assert str(result["date"]) in lines[-2]
        assert result["versions"]["torch"] in lines[-2]


def _check_layer_step(found: dict[str, Any]) -> None:
    assert found["config"]["layers"] == {"miniature": {"64x64": 2, "32x64": 2, "128x64": 2, "64x128": 1}}
    assert set(found["results"]) == {f"{s}_{t}" for s in found["config"]["layers"]["miniature"] for t in (1, 8)}
    for stage in found["results"].values():
        assert set(stage) == {
            "nf4", "plain", "qosora-64", "qosora-128", "qosora-256", "lora", "dora", "vera", "wall_seconds",
        }  # fmt: skip
        assert stage["nf4"]["ratio"]["median"] == 1


def _check_optimizer_step(results: dict[str, Any]) -> None:
    vectors, matrices = results["qosora"], results["lora"]
    # q, k, v, o, gate, up, down of two layers, each with s (at most 64 wide here) and o, or with A and B
    assert vectors["tensors"] == matrices["tensors"] == 2 * 7 * 2
    sizes = ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))
    assert vectors["parameters"] == 2 * sum(min(m, n) + m for m, n in sizes)
    assert matrices["parameters"] == 2 * sum(16 * (m + n) for m, n in sizes)
    for stage in (vectors, matrices):
        assert set(stage["step"]) == set(stage["all"]) == set(stage["memory"])
        assert len(stage["step"]) == 6
    assert vectors["memory"]["bitsandbytes-32bit"]["state_bytes"] == vectors["parameters"] * 8
    assert vectors["memory"]["packed-32bit"]["state_bytes"] == 2 * 7 * 2 * 256 * 8  # each in a block of 256


def _check_generate(results: dict[str, Any]) -> None:
    assert set(results) == {"miniature_1", "miniature_2"}
    for stage in results.values():
        for part, tokens in (("prefill", 16), ("decode", 3)):
            assert set(stage[part]) == {"lora", "nf4", "qosora", "qosora-merged"}
            for method, timing in stage[part].items():
                rate = stage["batch_size"] * tokens / timing["seconds"]["median"]
                assert stage["tokens_per_second"][part][method] == pytest.approx(rate, rel=1e-3)


def _check_load(stage: dict[str, Any]) -> None:
    assert stage["bytes"]["nf4"] < stage["bytes"]["16-bit"]
    assert set(stage["ways"]) == {"qosora", "nf4", "nf4-on-the-fly"}
    for result in stage["ways"].values():
        assert set(result["seconds"]) == {"load", "adapter", "both"}
        assert result["peak_resident_bytes"] > result["peak_anonymous_bytes"] > 50 * 2**20  # Python and torch at least


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """Yield all numbers in a result, and where they are."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{where}/{key}")
    elif isinstance(value, int | float):
        yield where, value


@pytest.mark.slow
def test_what_is_learned_in_miniature(tmp_path: Path) -> None:
    quality = BENCHMARKS / "quality"
    run = [sys.executable, "-W", "ignore", str(quality / "run_quality.py"), "--miniature", "--minutes", "5"]
    run += ["--work-dir", str(tmp_path / "work"), "--output", str(tmp_path / "results"), "--seeds", "0", "1"]
    run += ["--only", "lora_r16", "qosora_r64"]
    assert subprocess.run(run, capture_output=True).returncode == 0
    done = {file.relative_to(tmp_path / "results") for file in (tmp_path / "results").rglob("seed*.json")}
    assert len(done) == 4
    again = subprocess.run(run, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")  # nothing is run twice
    page = [sys.executable, str(quality / "quality_page.py"), str(tmp_path / "results")]
    assert subprocess.run(page, capture_output=True).returncode == 0
    text = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    for label in ("LoRA r = 16 on NF4 (QLoRA)", "qosora r = 64"):
        assert f"| {label} | " in text
    assert (tmp_path / "results" / "demo.png").read_bytes().startswith(b"\x89PNG")

"""`benchmarks/gpu/run_all.py`: each part in miniature on the CPU, and that nothing a part does ends the others."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def run_all(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, beside those that it and the benchmarks import."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    import run_all

    return run_all


def names() -> list[Any]:
    """Parts, and what these need."""
    sys.path.insert(0, str(BENCHMARKS / "gpu"))
    try:
        from run_all import PARTS
    finally:
        sys.path.pop(0)
    triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
    return [pytest.param(name, marks=[triton] * (name == "kernels")) for name in PARTS]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["parts"]
    return found


@pytest.mark.parametrize("name", names())
@pytest.mark.slow
def test_each_part_in_miniature(name: str, run_all: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Scripts run in this process, which has their imports, and compile nothing.

    In one of their own run pytest, and the kernels: Triton's interpreter has to be asked for before Triton is imported.
    """

    def launch(command: Sequence[str], environment: Mapping[str, str], seconds: float, log: Path) -> int | None:
        if command[1] == "-m" or name == "kernels":
            return run_all.launch(command, environment, seconds, log)
        with (
            pytest.MonkeyPatch.context() as patch,
            log.open("a") as out,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            torch._dynamo.config.patch(disable=True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            patch.setattr(sys, "argv", list(command[1:]))
            try:
                runpy.run_path(str(ROOT / command[1]), run_name="__main__")
            except SystemExit as error:
                return int(bool(error.code))
        return 0

    folder = tmp_path / "out"
    status = run_all.main(["--miniature", "--only", name, "--output", str(folder)], start=launch)
    entry = summary(folder)[name]
    assert entry["failure"] is None, (folder / "log.txt").read_text()
    assert status == 0
    assert entry["figures"]
    assert entry["record"]["results"]
    assert str(tmp_path) not in json.dumps(entry["command"])
    assert {path.name for path in folder.iterdir()} == {"summary.json", "log.txt"}
    assert capsys.readouterr().out.partition("\n\n")[0].splitlines()[-len(entry["figures"])].startswith(name)


@pytest.fixture
def part(run_all: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes a part of a few lines of Python that follow the writing of one result."""

    def make(name: str, lines: str = "", seconds: int = 60) -> Any:
        script = tmp_path / f"{name}.py"
        script.write_text(
            "import json, os, subprocess, sys, time\n"
            "result = {'results': {'stage': 0.5}}\n"
            "open(sys.argv[sys.argv.index('--output') + 1], 'w').write(json.dumps(result))\n"
            f"{lines}\n"
        )

        def figures(results: dict[str, Any]) -> Iterator[Any]:
            yield run_all.Figure("ratio", str(results["stage"]), "below 1", results["stage"] < 1)

        return run_all.Part(str(script), "", "", seconds, figures)

    return make


@pytest.mark.slow
def test_failures_and_time_limits_are_survived(
    run_all: Any, part: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    child = tmp_path / "child.py"
    child.write_text(f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    parts = {
        "broken": part("broken", "sys.exit('it broke')"),
        "slow": part("slow", f"subprocess.Popen([sys.executable, {str(child)!r}])\ntime.sleep(600)", seconds=4),
        "silent": part("silent", "os.remove(sys.argv[sys.argv.index('--output') + 1])"),
        "good": part("good"),
    }
    assert run_all.main(["--output", str(tmp_path / "out")], parts=parts) == 1
    entries = summary(tmp_path / "out")
    assert entries["broken"]["failure"] == "exit status 1: it broke"
    assert entries["slow"]["failure"] == "time was up after 4 s"
    assert entries["silent"]["failure"].startswith("no results that can be read")
    assert entries["good"]["failure"] is None
    for name in ("broken", "slow", "good"):  # what was there when they ended
        assert entries[name]["figures"] == [{"name": "ratio", "value": "0.5", "wanted": "below 1", "ok": True}], name
    rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()[-7:]
    assert rows[0].split() == ["PART", "figure", "measured", "wanted", "seconds"]
    assert [row.split()[0] for row in rows if not row.startswith(" ")] == ["PART", *parts]
    assert sum(" failed" in row for row in rows) == 3
    assert rows[-1].split()[:6] == ["good", "ratio", "0.5", "below", "1", "ok"]
    assert _gone(int((tmp_path / "pid").read_text()))


def _gone(pid: int) -> bool:
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_only_some_parts_and_no_time_left(
    run_all: Any, part: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parts = {name: part(name) for name in ("first", "second")}
    out = str(tmp_path / "out")
    assert run_all.main(["--output", out, "--only", "second"], parts=parts) == 0
    assert list(summary(tmp_path / "out")) == ["second"]
    assert run_all.main(["--output", out, "--only", "first"], parts=parts) == 0
    assert set(summary(tmp_path / "out")) == {"first", "second"}  # earlier results stay
    capsys.readouterr()
    assert run_all.main(["--output", out, "--seconds", "1"], parts=parts) == 0
    rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == ["PART", "first", "second"]
    assert all("not run" in row for row in rows[1:])
    assert summary(tmp_path / "out")["first"]["failure"] is None
    with pytest.raises(SystemExit):
        run_all.main(["--output", out, "--only", "third"], parts=parts)


def test_results_of_another_shape_are_a_failure(run_all: Any, part: Callable[..., Any], tmp_path: Path):
    odd = replace(part("odd"), figures=run_all.train)
    assert run_all.main(["--output", str(tmp_path / "out")], parts={"odd": odd}) == 1
    assert summary(tmp_path / "out")["odd"]["failure"].startswith("no results that can be read: TypeError")


def test_reports_of_pytest(run_all: Any, tmp_path: Path):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_state_is_paged"/>'
        '<testcase classname="tests.test_a" name="test_b"><failure/></testcase>'
        '<testcase classname="tests.test_a" name="test_c"><skipped/></testcase></testsuite></testsuites>'
    )
    figures = list(run_all.tests(run_all._read(report)["results"]))
    assert [(f.name, f.value, f.ok) for f in figures] == [
        ("tests marked gpu", "1 passed, 1 failed, 1 skipped", False),
        ("test_a::test_b", "failed", False),
        ("paged states, and after resume", "1 of 1 tests pass", True),
    ]


def test_figures_that_only_a_gpu_has(run_all: Any):
    cuda = {"allocated_bytes": 100, "reserved_bytes": 110, "context_bytes": 500 * 2**20, "workspace_bytes": 2**26}
    found = {
        "planned_over_measured": 1.04,
        "planned_bytes": 5 * 2**30,
        "peak_bytes": 2**32,
        "cuda": cuda,
        "attention": ["aten::_scaled_dot_product_flash_attention"],
    }
    figures = list(run_all.memory({"measured_llama-2-7b_2048_checkpointed": {"qosora": found, "qlora": found}}))
    assert [f.ok for f in figures] == [False, None, False, None, None, None, None]
    assert [f.value for f in figures[3:]] == ["flash_attention", "10.0% to 10.0%", "500 to 500 MiB", "64 to 64 MiB"]
    methods = {"qosora-compiled": 1.1}
    result = {method: {"tokens_per_second": 9000.0, "peak_bytes": 2**32} for method in methods}
    over = {method: {"tokens_per_second": ratio, "peak_bytes": 0.7} for method, ratio in methods.items()}
    stage = {"batch_size": 1, "tokens": 2048, "graphs": 0, "graph_breaks": 1, **result, "over_qlora": over}
    figures = list(run_all.train({"llama-2-7b_1x2048_checkpointed_compiled": stage}))
    assert [(f.value, f.ok) for f in figures] == [
        ("9,000, 1.10x QLoRA's", False),
        ("0, 1 breaks", False),
        ("4.00 GiB, 0.70x QLoRA's", True),
    ]


def test_figures_of_kernels(run_all: Any):
    fast, slow = ({"device_speedup": speedup, "gb_per_second": {"fused": 100.0}} for speedup in (2.0, 0.9))
    figures = run_all.kernels({"scaled_U_96x64_r8": fast, "scaled_U_64x64_r8": slow, "dequantize_64x64_r8": fast})
    assert [(f.name.partition(":")[0], f.value, f.ok) for f in figures] == [
        ("scaled_U", "0.90x to 2.00x, at best 100 GB/s", False),
        ("dequantize", "2.00x to 2.00x, at best 100 GB/s", True),
    ]


@pytest.mark.parametrize(("base", "each", "lost"), [(5000, 3, 0), (5000, 3, 7000), (20_000, 1, 3000), (30_000, 1, 0)])
def test_search_of_the_longest(run_all: Any, base: int, each: int, lost: int):
    """Against memory that grows in a line, of which fragments are lost to long sequences."""
    limits = runpy.run_path(str(BENCHMARKS / "gpu" / "limits.py"), run_name="limits")
    limit, unit, most, tried = 29_000, 64, 8192, []

    def probe(length: int) -> dict[str, Any]:
        tried.append(length)
        peak = base + each * length
        return {"fits": peak + (lost if length > 1024 else 0) <= limit, "peak_bytes": peak, "limit_bytes": limit}

    found = limits["search"](probe, (512, 1024), unit, most, 60)
    longest = max((length for length, result in found.items() if result["fits"]), default=0)
    room = (limit - base - lost) // each
    expected = min(most, room // unit * unit) if room > 0 else 0
    assert longest == expected
    assert len(tried) == len(set(tried)) <= 12
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") is None

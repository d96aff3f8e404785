"""Pictures of plans and measurements: the numbers in them, the files, the snapshot."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import pytest
from tiny_bases import make_base

from qosora.cli import main
from qosora.errors import ConfigError
from qosora.memory.plan import events, plan
from qosora.memory.profile import Measurement, profile
from qosora.memory.report import report, timeline

pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")
FILES = ["steps.png", "peak.png", "memory.html", "snapshot.pickle"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    base = make_base(tmp_path_factory.mktemp("base") / "llama")
    return profile(base, batch_size=2, seq_len=32, steps=1)


def test_the_timeline_has_the_peak(measured: Measurement):
    line = timeline(measured.events)
    assert max(line.totals) == measured.live.allocated_bytes
    at = line.totals.index(max(line.totals))
    assert {name: values[at] for name, values in line.live.items() if values[at]} == measured.live.rows
    assert [name for name, _ in line.phases] == ["forward", "loss", "backward", "optimizer"]


def test_a_short_timeline_keeps_the_peak(measured: Measurement):
    line = timeline(measured.events, points=20)
    assert len(line.totals) <= 20
    assert max(line.totals) == measured.live.allocated_bytes


def test_files_of_a_measurement(measured: Measurement, tmp_path: Path):
    assert [path.name for path in report(measured, measured.events, tmp_path / "out")] == FILES
    check(tmp_path / "out", "measured on cpu")


def test_files_of_a_plan(tmp_path: Path):
    found = plan("qwen2.5-0.5b", batch_size=1, seq_len=64, gpu_memory="8GiB", grid=False)
    report(found, events("qwen2.5-0.5b", found), tmp_path)
    check(tmp_path, "planned for 8 GiB")


def check(folder: Path, title: str) -> None:
    for name in ("steps.png", "peak.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "memory.html").read_text()
    assert title in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)|https?://", page), "the page must need no network"
    with open(folder / "snapshot.pickle", "rb") as file:
        found = pickle.load(file)
    live: dict[int, int] = {}
    for entry in found["device_traces"][0]:
        assert {"action", "addr", "size", "stream", "frames"} <= entry.keys()
        if entry["action"] == "alloc":
            assert entry["addr"] not in live
            live[entry["addr"]] = entry["size"]
        elif entry["action"] == "free_completed":
            assert live.pop(entry["addr"]) == entry["size"]
    assert live, "what lasts is never freed"


def test_without_matplotlib(measured: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'qosora\[plots\]'"):
        report(measured, measured.events, tmp_path)


def test_commands(measured: Measurement, tmp_path: Path):
    assert main(["profile", measured.model, "--seq-len", "16", "--steps", "1", "--report", str(tmp_path / "a")]) == 0
    args = ["plan", measured.model, "--seq-len", "16", "--no-grid", "--report", str(tmp_path / "b")]
    assert main(args) == 0
    for folder in ("a", "b"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == sorted(FILES)

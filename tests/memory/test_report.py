"""Pictures of plans and measurements: the numbers in them, the files, the snapshot."""

from __future__ import annotations

import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_base
from torch.cuda import _memory_viz

from qosora.cli import main
from qosora.errors import ConfigError
from qosora.memory.plan import events, plan
from qosora.memory.profile import Measurement, profile
from qosora.memory.report import _columns, report, snapshot, timeline

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


@pytest.mark.slow
def test_files_of_a_plan(tmp_path: Path):
    found = plan("qwen2.5-0.5b", batch_size=1, seq_len=64, gpu_memory="8GiB", grid=False)
    report(found, events("qwen2.5-0.5b", found), tmp_path)
    check(tmp_path, "planned for 8 GiB")


def test_a_gpu_is_compared_by_what_pytorch_counts(measured: Measurement):
    assert measured.planned is not None
    planned = replace(measured.planned, rows=measured.planned.rows | {"CUDA context": 7}, total_bytes=0)
    found = _columns(replace(measured, planned=planned, allocated_bytes={"loss": measured.measured_bytes + 5}))
    assert found["measured"].rows == measured.live.rows | {"not traced": 5}
    assert found["planned"].rows == measured.planned.rows
    for usage in found.values():
        assert usage.total_bytes == sum(usage.rows.values())


def check(folder: Path, title: str) -> None:
    for name in ("steps.png", "peak.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "memory.html").read_text()
    assert title in page
    assert page.count("data:image/png;base64,") == 2
    assert '<meta name="viewport" content="width=device-width">' in page
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
    # PyTorch's own reader: an entry that it does not know it prints as it is, one without its pair without a name
    lines = _memory_viz.trace(found).splitlines()[2:-1]
    assert len(lines) == len(found["device_traces"][0])
    forms = r"[a-z]\d* = MEM\[.*\]|del [a-z]\d* # .*|# free completed for [a-z]\d* .*"
    assert [line for line in lines if not re.fullmatch(forms, line)] == []
    assert "Active Memory Timeline" in _memory_viz.trace_plot(found)


def test_the_snapshot_says_what_memory_is_for(measured: Measurement, tmp_path: Path):
    snapshot(measured.events, tmp_path / "snapshot.pickle")
    entries = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())["device_traces"][0]
    frames = {tuple((f["filename"], f["name"]) for f in e["frames"]) for e in entries if e["action"] == "alloc"}
    assert (("base residual", "registered"), ("base residual", "step"), ("base residual", "setup")) in frames
    places = {(made_for, place) for ((made_for, _), (_, place), _) in frames}
    assert ("layer temporaries", "layers.*.mlp.down_proj, layer 1") in places


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

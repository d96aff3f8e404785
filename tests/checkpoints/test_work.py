"""Units read ahead, made and written behind, by one process or several, whatever happens in between."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qosora.checkpoints.shards import StoredSpec
from qosora.checkpoints.work import Progress, Unit, stream
from qosora.errors import CheckpointError, ConfigError

SPEC = StoredSpec(torch.float32, (3,))


def unit(source: Path, i: int, *, log: list[str] | None = None, fail: Exception | None = None) -> Unit:
    def read() -> int:
        if log is not None:
            log.append(f"read {i} in {threading.current_thread().name.split('-')[0]}")
        return i

    def make(value: int) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        if fail:
            raise fail
        if log is not None:
            log.append(f"make {i}")
        return {f"t{i}": torch.full((3,), float(value))}, {"i": value}

    return Unit(f"u{i}", {f"t{i}": SPEC}, float(1 + i % 4), [source], read, make)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_text("values")
    return file


def run(output: Path, units: Sequence[Unit], **options: Any) -> dict[str, dict[str, Any]]:
    def finish(path: Path, reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        (path / "config.json").write_text("{}")
        return {"sum": sum(report["i"] for report in reports.values())}

    return stream(output, units, finish, **{"job": {"rank": 1}, "max_shard_bytes": 40, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_unit_is_made_once_and_read_ahead(tmp_path: Path, source: Path):
    log: list[str] = []
    states: list[Progress] = []
    reports = run(tmp_path / "out", [unit(source, i, log=log) for i in range(7)], progress=states.append)
    assert reports == {f"u{i}": {"i": i} for i in range(7)}
    assert [entry for entry in log if entry.startswith("make")] == [f"make {i}" for i in range(7)]
    assert [entry for entry in log if entry.startswith("read")] == [f"read {i} in ThreadPoolExecutor" for i in range(7)]
    assert all(log.index(f"read {i + 1} in ThreadPoolExecutor") <= log.index(f"make {i}") + 1 for i in range(6))
    held = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert {name: t.tolist() for name, t in held.items()} == {f"t{i}": [float(i)] * 3 for i in range(7)}
    assert [state.done for state in states] == list(range(8))
    assert states[-1].done_bytes == states[-1].total_bytes == 7 * 12
    assert states[0].seconds_left is None
    assert states[-1].seconds_left == 0


def test_after_an_error_it_goes_on_and_the_result_is_the_same(tmp_path: Path, source: Path):
    units = [unit(source, i) for i in range(7)]
    run(tmp_path / "undisturbed", units)
    broken = [*units[:4], unit(source, 4, fail=CheckpointError("t4 holds NaN")), *units[5:]]
    message = r"t4 holds NaN \[4 of 7 units .* kept in .*out.partial: the same command goes on from there\]"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path / "out", broken)
    log: list[str] = []
    run(tmp_path / "out", [unit(source, i, log=log) for i in range(7)])
    assert [entry for entry in log if entry.startswith("make")] == ["make 4", "make 5", "make 6"]
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_interrupted_when_all_is_made_it_goes_on(tmp_path: Path, source: Path, begun: bool):
    units = [unit(source, i) for i in range(7)]
    run(tmp_path / "undisturbed", units)

    def interrupted(folder: Path, reports: Any) -> dict[str, Any]:
        if begun:
            (folder / ".qosora_manifest.json.tmp").write_text("half")
            (folder / "code").mkdir()
            (folder / "code" / "x.py").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "out", units, interrupted, job={"rank": 1}, max_shard_bytes=40)
    run(tmp_path / "out", units)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "undisturbed"}


def test_an_error_in_the_first_unit_leaves_nothing(tmp_path: Path, source: Path):
    with pytest.raises(CheckpointError, match=r"^t0 holds NaN$"):
        run(tmp_path / "new" / "out", [unit(source, 0, fail=CheckpointError("t0 holds NaN"))])
    assert list(tmp_path.iterdir()) == [source]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, source: Path):
    units = [unit(source, i) for i in range(3)]

    def change(state: Progress) -> None:
        if state.done == 1:
            source.write_text("other values")

    with pytest.raises(CheckpointError, match="source was changed while it was read"):
        run(tmp_path / "out", units, progress=change)
    log: list[str] = []
    run(tmp_path / "out", [unit(source, i, log=log) for i in range(3)])
    assert len(log) == 6  # all of them anew


def test_another_job_is_refused(tmp_path: Path, source: Path):
    units = [unit(source, 0), unit(source, 1, fail=CheckpointError("no"))]
    with pytest.raises(CheckpointError):
        run(tmp_path / "out", units)
    with pytest.raises(ConfigError, match="rank was 1, is 2"):
        run(tmp_path / "out", units, job={"rank": 2})
    run(tmp_path / "out", [unit(source, i) for i in range(2)], job={"rank": 2}, restart=True)


def test_a_full_disk_loses_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    units = [unit(source, i) for i in range(3)]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CheckpointError, match=r"out: No space left on device; make room and run again$"):
            run(tmp_path / "out", units)
    assert list(tmp_path.iterdir()) == [source]
    full_late = unit(source, 1, fail=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match=r"make room and run again \[1 of 3 units"):
        run(tmp_path / "out", [units[0], full_late, units[2]])
    run(tmp_path / "out", units)
    assert not (tmp_path / "out.partial").exists()


JOB = """
import sys, time
from pathlib import Path
import torch
from qosora.checkpoints.shards import StoredSpec
from qosora.checkpoints.work import Processes, Unit, stream

folder, delay = Path(sys.argv[1]), float(sys.argv[2])

def unit(i):
    def make(_):
        time.sleep(delay)
        print("made", i, flush=True)
        if len(sys.argv) > 3 and i == int(sys.argv[3]):
            raise ValueError("stop")
        return {f"t{i}": torch.full((1000,), float(i))}, {"i": i}
    spec = StoredSpec(torch.float32, (1000,))
    return Unit(f"u{i}", {f"t{i}": spec}, 1.0 + i % 3, [folder / "source"], lambda: i, make)

def finish(path, reports):
    (path / "config.json").write_text("{}")
    return {"n": len(reports)}

with Processes() as processes:
    stream(folder / "out", [unit(i) for i in range(20)], finish, job={}, max_shard_bytes=9000, processes=processes)
"""


def start(folder: Path, *args: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder), *args],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "source").write_text("values")
    with start(folder, "0") as process:
        process.communicate()
    assert process.returncode == 0
    return contents(folder / "out")


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, source: Path, undisturbed: dict[str, bytes]):
    made: list[str] = []
    for kill in (0.05, 0.2, None):
        with start(tmp_path, "0.02") as process:
            assert process.stdout is not None
            made.append(process.stdout.readline())
            if kill:
                time.sleep(kill * random.random())
                process.send_signal(signal.SIGKILL)
            made += process.stdout.readlines()
    assert process.returncode == 0
    assert len(made) <= 20 + 2 * 2  # at each kill a unit was being made and another one written
    assert contents(tmp_path / "out") == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_all(folder: Path, count: int, *args: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count)} for i in range(count)]
    return [start(folder, *args, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **rank) for rank in ranks]


@pytest.mark.slow
def test_processes_divide_the_units_and_write_the_same_bytes(
    tmp_path: Path, source: Path, undisturbed: dict[str, bytes]
):
    processes = start_all(tmp_path, 3, "0")
    printed = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    shares = [{word for word in words if word != "made"} for words in printed]
    assert sorted(int(i) for share in shares for i in share) == list(range(20))
    assert all(5 <= len(share) <= 9 for share in shares)
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_where_the_first_process_cannot_prepare_all_end(tmp_path: Path, source: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    processes = start_all(tmp_path, 2, "0")
    assert [process.communicate()[0] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [1, 1]

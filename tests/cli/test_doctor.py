"""`qosora doctor`: its table, its JSON, its exit status, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qosora import doctor
from qosora.cli import main
from qosora.doctor import Diagnosis, Finding

ROWS = [Finding("torch", "2.13.0"), Finding("GPU", "none", "take a machine with one")]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What is found, to be added to."""
    rows = list(ROWS)
    monkeypatch.setattr(doctor, "diagnose", lambda: Diagnosis(rows, None))
    return rows


def test_the_table(found: list[Finding], capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "torch  2.13.0",
        "GPU    none",
        "",
        "- GPU: take a machine with one",
        "",
        "training works on the CPU, slowly",
    ]


def test_what_stops_training_is_exit_status_1(found: list[Finding], capsys: pytest.CaptureFixture[str]):
    found.append(Finding("trl", "not installed", "training needs it", stops=True))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "! trl: training needs it" in shown.out
    assert shown.err == "qosora doctor: error: training cannot work here: see trl [Q-RUN]\n"


@pytest.mark.parametrize("stops", [False, True])
def test_json(found: list[Finding], stops: bool, capsys: pytest.CaptureFixture[str]):
    found.append(Finding("trl", "not installed", "training needs it", stops))
    assert main(["doctor", "--json"]) == stops
    shown = json.loads(capsys.readouterr().out)
    assert shown["works"] is not stops
    assert shown["findings"][2] == {
        "name": "trl", "found": "not installed", "advice": "training needs it", "stops": stops,
    }  # fmt: skip


BROKEN = """
import sys, psutil, trl.kernels.chunked_logprob as loss
del loss.TOKEN_CHUNK_SIZE, psutil.virtual_memory
from qosora.cli import main
sys.exit(main(["doctor"]))
"""


@pytest.mark.slow
def test_a_broken_installation_in_a_process_of_its_own():
    run = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "qosora doctor: error: training cannot work here: see inside trl [Q-RUN]\n"
    assert "! inside trl: qosora works with trl <" in run.stdout
    assert "- memory: " in run.stdout
    assert "4 bits and optimizer" in run.stdout
    assert "Traceback" not in run.stdout

"""`diagnose`: what is missing is told in a line each, and no check hides another."""

from __future__ import annotations

import builtins
import logging
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from qosora import doctor, layers, training
from qosora.compat import bitsandbytes, names
from qosora.doctor import GIB, Check, Diagnosis, Finding, diagnose


@pytest.fixture(autouse=True)
def _no_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the driver's tool, wherever this runs."""
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda field: None)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU as torch tells of it; nothing runs there."""
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, bf16=True, free=139 * GIB, count=1)
    patches = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: gpu.count,
        "get_device_name": lambda: gpu.name,
        "get_device_properties": lambda index: gpu,
        "mem_get_info": lambda index: (gpu.free, 140 * GIB),
        "is_bf16_supported": lambda including_emulation: gpu.bf16,
    }
    for name, value in patches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return gpu


def run(check: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in check()}


# ---- all of it -----------------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu(on_a_cpu: None):
    found = diagnose()
    assert (found.works, found.verdict) == (True, "training works on the CPU, slowly")
    told = {finding.name: finding for finding in found.findings}
    assert set(names.TRIED) | {"accelerate", "safetensors", "datasets"} <= set(told)
    assert told["4 bits and optimizer"].found == "a round trip on the CPU works"
    assert "many times as slowly" in told["GPU"].advice
    assert all("\n" not in finding.found + finding.advice for finding in found.findings)
    assert not any(finding.found.startswith("the check failed") for finding in found.findings)


def test_no_check_hides_another(monkeypatch: pytest.MonkeyPatch, on_a_cpu: None):
    def half() -> Iterator[Finding]:
        yield Finding("half", "there")
        raise OSError("the other half\nis not")

    def loud() -> Iterator[Finding]:
        logging.getLogger("anything").critical("never seen")
        yield Finding("loud", "there")

    monkeypatch.setattr(doctor, "CHECKS", (Check("first", half, False), Check("second", half, True),
                                           Check("third", loud, True)))  # fmt: skip
    found = diagnose()
    assert [(f.name, f.stops) for f in found.findings] == [
        ("half", False), ("first", False), ("half", False), ("second", True), ("loud", False),
    ]  # fmt: skip
    assert found.findings[1].found == "the check failed: OSError"
    assert found.findings[1].advice.startswith("the other half; ")
    assert found.verdict == "training cannot work here: see second"
    assert logging.root.manager.disable == 0


def test_nothing_that_it_reads_is_there(monkeypatch: pytest.MonkeyPatch):
    """Without any of the packages every check ends in a finding."""
    heavy = ("torch", "transformers", "peft", "trl", "bitsandbytes", "psutil", "huggingface_hub", "triton")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in heavy:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] in heavy]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(names, "missing", lambda: {"torch": ["No module named 'torch'"]})
    found = diagnose()
    assert not found.works
    assert {"inside torch", "GPU", "memory", "disk", "CPU in 16 bits"} <= {finding.name for finding in found.findings}
    assert found.device is None


def test_plain_data():
    found = Diagnosis([Finding("GPU", "none", "take one"), Finding("torch", "1")], None)
    assert found.to_dict() == {
        "works": True,
        "verdict": "training works on the CPU, slowly",
        "findings": [
            {"name": "GPU", "found": "none", "advice": "take one", "stops": False},
            {"name": "torch", "found": "1", "advice": "", "stops": False},
        ],
        "device": None,
    }
    assert Diagnosis([], "NVIDIA H200").verdict == "training works on the NVIDIA H200"


# ---- packages ------------------------------------------------------------------------------------------------------


def test_versions(monkeypatch: pytest.MonkeyPatch):
    installed = {"torch": "2.13.1+cu128", "transformers": "5.25.0.dev0", "peft": "0.20.0", "trl": "1.16.0",
                 "accelerate": "1.0", "safetensors": "0.8", "datasets": "5.2"}  # fmt: skip

    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(doctor, "version", version)
    found = run(doctor._versions)
    assert found["torch"] == Finding("torch", f"2.13.1+cu128 (tried: {', '.join(names.TRIED['torch'].versions)})")
    assert found["transformers"].advice.startswith("newer than what was tried")
    assert found["transformers"].advice.endswith("pip install 'transformers==5.24.0'")
    assert found["peft"].advice.startswith("older than what was tried")
    assert found["bitsandbytes"].advice == "training needs it: pip install 'bitsandbytes<0.51'"
    assert [finding.name for finding in found.values() if finding.stops] == ["bitsandbytes"]


@pytest.mark.parametrize(
    ("package", "installed", "expected"),
    [
        ("torch", "2.11.0", None),
        ("torch", "2.14.2+cpu", None),
        ("torch", "2.15.0.dev20261101", "newer"),
        ("torch", "2.10.1", "older"),
        ("peft", "0.21.0", "older"),
        ("trl", "1.17", "newer"),
    ],
)
def test_what_was_tried(package: str, installed: str, expected: str | None):
    assert names.untried(package, installed) == expected


def test_a_missing_name_stops(monkeypatch: pytest.MonkeyPatch):
    import trl.kernels.chunked_logprob as loss

    monkeypatch.delattr(loss, "TOKEN_CHUNK_SIZE")
    (finding,) = doctor._names()
    assert (finding.name, finding.stops) == ("inside trl", True)
    assert finding.found.startswith("1 of the names")
    assert "has no trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE: pip install 'trl" in finding.advice


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace):
    assert bitsandbytes.why_no_library() is None
    from bitsandbytes import cextension

    stand_in = cextension.ErrorHandlerMockBNBNativeLibrary("no binary for CUDA 99\nmore")
    monkeypatch.setattr(cextension, "lib", stand_in)
    assert bitsandbytes.why_no_library() == "no binary for CUDA 99"
    (finding,) = doctor._library()
    assert (finding.found, finding.stops) == ("not loaded: no binary for CUDA 99", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = doctor._library()
    assert not finding.stops
    assert finding.advice.startswith("slow plain code")


# ---- the GPU -------------------------------------------------------------------------------------------------------


def test_a_gpu(gpu: SimpleNamespace):
    found = run(doctor._gpu)
    assert found["GPU"] == Finding("GPU", "NVIDIA H200, 140.0 GiB, 139.0 GiB free, compute capability 9.0")
    assert found["bf16 on the GPU"] == Finding("bf16 on the GPU", "yes")
    assert found["CUDA"].found.startswith("torch is built for CUDA 12.8")


def test_an_old_gpu_that_others_use(gpu: SimpleNamespace):
    gpu.bf16, gpu.free, gpu.count = False, 20 * GIB, 2
    found = run(doctor._gpu)
    assert found["GPU"].found.endswith(", one of 2")
    assert "others hold" in found["GPU"].advice
    assert "fp16" in found["bf16 on the GPU"].advice


@pytest.mark.parametrize(("build", "cure"), [(None, "install a CUDA build of torch"), ("12.8", "update the driver")])
def test_a_gpu_that_torch_cannot_use(build: str | None, cure: str, on_a_cpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor, "_nvidia_smi", {"name": "NVIDIA L4", "driver_version": "550.1"}.get)
    found = run(doctor._gpu)
    assert found["GPU"].found == "NVIDIA L4, which torch cannot use"
    assert cure in found["GPU"].advice
    assert found["CUDA"].found.endswith("driver: 550.1")


def test_a_gpu_on_which_nothing_runs_stops(gpu: SimpleNamespace):
    if torch.cuda.device_count() and torch.backends.cuda.is_built():
        pytest.skip("needs a torch for CPUs")
    found = diagnose()
    assert not found.works
    told = {finding.name: finding for finding in found.findings}
    assert told["4 bits and optimizer"].stops
    assert told["fused kernels"].found.startswith("the plain code runs instead")
    assert "450 launches" in told["fused kernels"].advice


def test_wrong_numbers_stop(monkeypatch: pytest.MonkeyPatch, on_a_cpu: None):
    monkeypatch.setattr(layers, "dequantize", lambda q: torch.zeros(q.shape), raising=False)
    with pytest.raises(Exception, match="come back from 4 bits with an error of 1"):
        list(doctor._round_trip())
    monkeypatch.undo()
    monkeypatch.setattr(training.PackedPagedOptimizer, "step", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Exception, match=r"misses 0\.9"):
        list(doctor._round_trip())


def test_states_that_are_not_paged(monkeypatch: pytest.MonkeyPatch, on_a_cpu: None):
    assert not run(doctor._round_trip)["optimizer states"].advice


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    found = diagnose()
    assert found.works, found
    told = {finding.name: finding for finding in found.findings}
    assert told["4 bits and optimizer"].found == "a round trip on the CUDA works"
    assert found.device == torch.cuda.get_device_name()


def test_kernels(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layers, "why_unfused", lambda: None, raising=False)
    assert run(doctor._kernels)["fused kernels"].found.startswith("work (")


def test_no_triton(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", absent)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "qosora.layers.triton_ops", raising=False)
    monkeypatch.delattr(layers, "triton_ops", raising=False)
    monkeypatch.setattr(torch, "linspace", lambda *_, device: torch.ones(128))
    found = run(doctor._kernels)["fused kernels"]
    assert found.found == "the plain code runs instead (no triton)"
    assert "need triton, which cannot be imported here" in found.advice
    assert not found.stops


# ---- the machine ---------------------------------------------------------------------------------------------------


def test_little_room(monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**30, 2**30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB, total=8 * GIB))
    found = run(doctor._disk) | run(doctor._memory)
    assert "HF_HOME" in found["disk of the hub's cache"].advice
    assert found["disk here"].found.startswith("1.0 GiB free, ")
    assert found["memory"].found == "1.0 GiB of 8.0 GiB free"
    assert "0.8 GiB" in found["memory"].advice


def test_a_cpu_that_is_slow_in_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qosora.layers.precision.slowdown", {torch.bfloat16: 0.5, torch.float16: 5.0}.__getitem__)
    (finding,) = doctor._cpu()
    assert finding.found == "bf16 takes 0.5 times as long as fp32, fp16 takes 5 times as long as fp32"
    assert finding.advice.startswith("fp16: eval and generate")


def test_the_drivers_tool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # the tool itself, of which the answers are made up

    def answers(status: int, text: str) -> Any:
        return lambda command, **_: subprocess.CompletedProcess(command, status, text, "")

    for status, text, expected in ((0, "NVIDIA H200\nNVIDIA H200\n", "NVIDIA H200"), (0, "", None), (9, "no", None)):
        monkeypatch.setattr(subprocess, "run", answers(status, text))
        assert doctor._nvidia_smi("name") == expected

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    assert doctor._nvidia_smi("name") is None

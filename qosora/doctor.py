"""What a machine has for training, and what each thing costs that is missing or odd.

Every check stands alone and imports what it needs: one that fails is told in a line of its own, and hides no other.
"""

from __future__ import annotations

import importlib
import logging
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from qosora import __version__
from qosora.compat import names
from qosora.errors import QosoraError, first_line

__all__ = ["Diagnosis", "Finding", "diagnose", "versions"]

GIB = 2**30
_UNBOUND = ("accelerate", "safetensors", "datasets")  # used as they are documented, in any version
_MODULES = ("torch", "transformers", "peft", "trl", "bitsandbytes")  # of `compat`
#: Of Llama-2-7B: the checkpoint, 13.5 GB, and the base, 4.3 GB.
_DISK_BYTES = 18 * 10**9
#: What converting it takes is 0.8 GiB.
_MEMORY_BYTES = 2 * GIB
#: More than the error of any 4-bit value of a block whose largest is 1: half the widest gap of NF4's table is 0.152.
_ERROR = 0.17


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: Of the thing.
        found: What there is.
        advice: What it costs that it is missing or odd, and what to do; empty where nothing is.
        stops: Whether training cannot work.
    """

    name: str
    found: str
    advice: str = ""
    stops: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What all checks found.

    Attributes:
        findings: In the order of the checks.
        device: That trains: the GPU's name, or None for the CPU.
    """

    findings: list[Finding]
    device: str | None

    @property
    def works(self) -> bool:
        """Whether training can work."""
        return not any(finding.stops for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The whole in a line."""
        if not self.works:
            stopped = ", ".join(finding.name for finding in self.findings if finding.stops)
            return f"training cannot work here: see {stopped}"
        return f"training works on the {self.device}" if self.device else "training works on the CPU, slowly"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"works": self.works, "verdict": self.verdict, **asdict(self)}


class Check(NamedTuple):
    """Something to look at.

    Attributes:
        name: Of what could not be looked at, where `run` fails.
        run: Yields what it finds; may raise anything.
        needed: Whether training cannot work where it fails.
    """

    name: str
    run: Callable[[], Iterator[Finding]]
    needed: bool


def diagnose() -> Diagnosis:
    """Look at packages, GPU, kernels, disk and memory; nothing is downloaded, and little memory is used.

    Example:
        >>> from qosora import diagnose
        >>> diagnose().verdict  # doctest: +SKIP
        'training works on the NVIDIA H200'
    """
    findings: list[Finding] = []
    with _quiet():
        for check in CHECKS:
            try:
                for finding in check.run():  # those before an error count
                    findings.append(finding)
            except Exception as error:
                advice = (
                    "training needs it" if check.needed else "nothing is known of it; training may work all the same"
                )
                found = f"the check failed: {type(error).__name__}"
                findings.append(Finding(check.name, found, f"{first_line(error)}; {advice}", check.needed))
        device = _gpu_name()
    return Diagnosis(findings, device)


def versions() -> dict[str, Any]:
    """Return the versions that a report of an error needs, without importing any package."""
    packages: dict[str, str | None] = {}
    for package in (*names.TRIED, *_UNBOUND):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    found = {"qosora": __version__, "python": platform.python_version(), "system": platform.platform()}
    return {**found, "machine": platform.machine(), "packages": packages}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what libraries log and warn of: it is in a finding, or of no use here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _versions() -> Iterator[Finding]:
    for package in (*names.TRIED, *_UNBOUND):
        tried = names.TRIED.get(package)
        wanted = package if tried is None else f"'{package}<{tried.below}'"
        try:
            installed = version(package)
        except PackageNotFoundError:
            yield Finding(package, "not installed", f"training needs it: pip install {wanted}", stops=True)
            continue
        if tried is None:
            yield Finding(package, installed)
            continue
        age = names.untried(package, installed)
        advice = f"{age} than what was tried, so results may differ: pip install '{package}=={tried.versions[-1]}'"
        yield Finding(package, f"{installed} (tried: {', '.join(tried.versions)})", advice if age else "")


def _names() -> Iterator[Finding]:
    for module in _MODULES:
        importlib.import_module(f"qosora.compat.{module}")
    missing = names.missing()
    for package, problems in missing.items():
        found = f"{len(problems)} of the names that qosora uses are missing or do not load"
        yield Finding(f"inside {package}", found, problems[0], stops=True)
    if not missing:
        yield Finding("inside them", f"all {len(set(names.ENTRIES))} undocumented names that qosora uses")


def _gpu() -> Iterator[Finding]:
    import torch

    seen, cuda, rocm = _nvidia_smi("name"), torch.version.cuda, torch.version.hip
    if torch.cuda.is_available():
        index, count = torch.cuda.current_device(), torch.cuda.device_count()
        gpu, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        taken = "others hold much of its memory: end them (nvidia-smi lists them), or plan for what is free"
        yield Finding(
            "GPU",
            f"{gpu.name}, {_gib(total)}, {_gib(free)} free, compute capability {gpu.major}.{gpu.minor}"
            + f", one of {count}" * (count > 1),
            taken if free < 0.8 * total else "",
        )
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        overflows = "training takes fp16, which overflows more easily: nothing to do but to watch the loss"
        yield Finding("bf16 on the GPU", "yes" if bf16 else "no", "" if bf16 else overflows)
    elif seen is None:
        yield Finding(
            "GPU", "none", "training runs on the CPU, many times as slowly: take a machine with an NVIDIA GPU"
        )
    else:
        cure = "update the driver" if cuda else "install a CUDA build of torch (pytorch.org says how)"
        yield Finding(
            "GPU", f"{seen}, which torch cannot use", f"training runs on the CPU, many times as slowly: {cure}"
        )
    build = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPUs"
    yield Finding("CUDA", f"torch is built for {build}; NVIDIA driver: {_nvidia_smi('driver_version') or 'none'}")


def _nvidia_smi(field: str) -> str | None:
    """Return what the driver's tool says of the first GPU, or None without one."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = run.stdout.strip().splitlines()
    return lines[0].strip() if run.returncode == 0 and lines else None


def _gpu_name() -> str | None:
    try:
        import torch

        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    except Exception:  # that torch does not load is told by the checks
        return None


def _library() -> Iterator[Finding]:
    from qosora.compat.bitsandbytes import why_no_library

    reason, gpu = why_no_library(), _gpu_name() is not None
    if reason is None:
        yield Finding("bitsandbytes' library", "loaded")
        return
    cure = "`python -m bitsandbytes` tells more, and reinstalling bitsandbytes with this torch mostly helps"
    cost = "4-bit weights need it on a GPU" if gpu else "slow plain code runs in its place"
    yield Finding("bitsandbytes' library", f"not loaded: {reason}", f"{cost}: {cure}", stops=gpu)


def _round_trip() -> Iterator[Finding]:
    """Quantize, dequantize and take a step on the device that training would take."""
    import torch

    from qosora.decompose import quantize
    from qosora.layers import dequantize
    from qosora.training import PAGED_NUMEL, PackedPagedOptimizer, why_unpaged

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.linspace(-1, 1, 4096, device=device)
    error = float((dequantize(quantize(x)) - x).abs().max())
    if not error <= _ERROR:
        raise QosoraError(f"values of up to 1 come back from 4 bits with an error of {error:.2g}, above {_ERROR}")
    parameter = torch.nn.Parameter(torch.ones(PAGED_NUMEL, device=device))
    optimizer = PackedPagedOptimizer([("ones", parameter)], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    step = float((parameter.detach() - 0.9).abs().max())  # AdamW's first step is the learning rate
    if not step <= 1e-4:
        raise QosoraError(f"a step of AdamW from 1 by 0.1 misses 0.9 by {step:.2g}")
    yield Finding("4 bits and optimizer", f"a round trip on the {device.type.upper()} works")
    reason, paged = why_unpaged(device), optimizer.memory().paged_bytes > 0
    if paged or device.type == "cpu":
        yield Finding("optimizer states", "paged" if paged else "on the CPU, where nothing need be paged")
    else:
        cost = "they stay in GPU memory, 11 MiB for a 7B: page where that matters, under Linux on an NVIDIA GPU"
        yield Finding("optimizer states", "not paged", f"{reason or 'bitsandbytes gave ordinary memory'}; {cost}")


def _kernels() -> Iterator[Finding]:
    from qosora.layers import why_unfused

    try:
        triton = f"triton {version('triton')}"
    except PackageNotFoundError:
        triton = "no triton"
    if _gpu_name() is None:
        yield Finding("fused kernels", f"for GPUs only ({triton})")
    elif reason := why_unfused():
        cost = "training works, with 450 launches a decoder layer of a Llama in place of 276"
        yield Finding("fused kernels", f"the plain code runs instead ({triton})", f"{reason}; {cost}")
    else:
        yield Finding("fused kernels", f"work ({triton})")


def _disk() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("disk here", Path.cwd()), ("disk of the hub's cache", Path(HF_HUB_CACHE).absolute())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        advice = "a 7B takes 13.5 GB to download and 4.3 GB as a base: make room, or point HF_HOME to another disk"
        yield Finding(name, f"{_gib(free)} free, {folder}", advice if free < _DISK_BYTES else "")


def _memory() -> Iterator[Finding]:
    import psutil

    found = psutil.virtual_memory()
    advice = "converting a 7B takes 0.8 GiB and loading it more: end other programs"
    yield Finding(
        "memory",
        f"{_gib(found.available)} of {_gib(found.total)} free",
        advice if found.available < _MEMORY_BYTES else "",
    )


def _cpu() -> Iterator[Finding]:
    import torch

    from qosora.layers import fast_dtype, slowdown

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    found = ", ".join(f"{name} takes {slowdown(dtype):.2g} times as long as fp32" for name, dtype in kinds.items())
    slow = [name for name, dtype in kinds.items() if fast_dtype(dtype) != dtype]
    advice = "eval and generate on the CPU compute in fp32 instead, at twice the bytes of what is not decomposed"
    yield Finding("CPU in 16 bits", found, f"{' and '.join(slow)}: {advice}" if slow else "")


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


CHECKS = (
    Check("versions", _versions, True),
    Check("inside them", _names, True),
    Check("GPU", _gpu, False),
    Check("bitsandbytes' library", _library, True),
    Check("4 bits and optimizer", _round_trip, True),
    Check("fused kernels", _kernels, False),
    Check("disk", _disk, False),
    Check("memory", _memory, False),
    Check("CPU in 16 bits", _cpu, False),
)

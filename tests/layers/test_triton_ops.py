"""The fused kernels against the plain code.

The tests of `TestOnADevice` run where there is a GPU, and everywhere else in Triton's interpreter: in a process of its
own, as TRITON_INTERPRET must be set before triton is imported. The interpreter computes what the kernels say, but cuts
float32 down to bfloat16 where a GPU rounds to the nearest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from linear_checks import build, check, draw, vectors
from torch import Tensor

from qosora.decompose import nf4
from qosora.decompose.nf4 import FourBitTensor
from qosora.layers import ops

V32 = 2.0**-24  # unit roundoff of float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
STORAGE = {
    "quant_type": st.sampled_from(nf4.QUANT_TYPES),
    "blocksize": st.sampled_from(nf4.BLOCKSIZES),
    "double_quant": st.booleans(),
}


#: Ranks and widths: rows of whole runs of 32, which all kernels take, that end inside blocks or with them.
FACTORS = {"r": st.sampled_from([1, 2, 64, 65, 100]), "m": st.sampled_from([32, 96, 160])}
SEED = st.integers(0, 2**32)
#: Few, and not shrunk where one fails: each is slow in the interpreter, and most compile a kernel anew on a GPU.
EXAMPLES = settings(max_examples=8, phases=(Phase.generate,))


class Factor(NamedTuple):
    U: FourBitTensor
    s: Tensor
    o: Tensor


def factor(r: int, m: int, seed: int, **storage: Any) -> Factor:
    generator = torch.Generator().manual_seed(seed)
    U = torch.randn(r, m, generator=generator) * torch.exp(torch.randn(r, 1, generator=generator))
    s, o = torch.randn(r, generator=generator), torch.randn(m, generator=generator)
    return Factor(nf4.quantize(U.to(DEVICE), **storage), s.to(DEVICE), o.to(DEVICE))


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The same bits; in the interpreter's bfloat16, at most the next number towards zero."""
    assert (got.dtype, got.shape, got.device) == (expected.dtype, expected.shape, expected.device)
    if INTERPRETED and got.dtype == torch.bfloat16:
        less = expected.float() - got.float()
        assert (less.abs() <= torch.finfo(got.dtype).eps * expected.float().abs()).all()
    else:
        assert torch.equal(got, expected)


def assert_close(got: Tensor, expected: Tensor, tolerance: Tensor, name: str) -> None:
    error = (got.double() - expected).abs()
    assert (error <= tolerance).all(), f"{name}: {(error / tolerance).nan_to_num().max():.2f} times the tolerance"


class TestOnADevice:
    pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

    @given(
        shape=st.lists(st.integers(1, 30), min_size=1, max_size=3).map(tuple),
        dtype=st.sampled_from(DTYPES),
        seed=SEED,
        **STORAGE,
    )
    @EXAMPLES
    def test_dequantize(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int, **storage: Any):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        q = nf4.quantize(x.to(DEVICE), **storage)
        with ops.fused():
            assert_same(ops.dequantize(q, dtype), nf4.dequantize(q, dtype))

    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
    def test_dequantize_many_blocks(self, quant_type: str, double_quant: bool):
        """More blocks than one absmax_scale covers, in several programs, all codes and most absmax codes among them."""
        q = factor(37, 601, 0, quant_type=quant_type, blocksize=32, double_quant=double_quant).U
        with ops.fused():
            assert_same(ops.dequantize(q), nf4.dequantize(q))

    @given(dtype=st.sampled_from(DTYPES), seed=SEED, **FACTORS, **STORAGE)
    @EXAMPLES
    def test_scaled_U(self, dtype: torch.dtype, r: int, m: int, seed: int, **storage: Any):
        operands = factor(r, m, seed, **storage)
        with ops.fused(False):
            expected = ops.scaled_U(*operands, dtype)
        with ops.fused():
            assert_same(ops.scaled_U(*operands, dtype), expected)

    @given(seed=SEED, **FACTORS, **STORAGE)
    @EXAMPLES
    def test_vector_gradients(self, r: int, m: int, seed: int, **storage: Any):
        U, s, o = factor(r, m, seed, **storage)
        P = draw(r, m, seed=seed + 1, dtype=torch.float32).to(DEVICE)
        with ops.fused():
            ds, do = ops.vector_gradients(P.clone(), U, s, o)
            again = ops.vector_gradients(P.clone(), U, s, o)
        assert torch.equal(ds, again[0])
        assert torch.equal(do, again[1])
        with ops.fused(False):
            plain_gradients = ops.vector_gradients(P.clone(), U, s, o)
        # K terms of two rounded products each, added in any order.
        product = P.double() * nf4.dequantize(U).double()
        to_ds, to_do = product * o.double(), product * s.double()[:, None]
        for expected, tolerance, fused, plain in zip(
            (to_ds.sum(1), to_do.sum(0)),
            ((m + 2) * V32 * to_ds.abs().sum(1), (r + 2) * V32 * to_do.abs().sum(0)),
            (ds, do),
            plain_gradients,
            strict=True,
        ):
            assert_close(fused, expected, tolerance, "fused")
            assert_close(plain, expected, tolerance, "plain")

    @given(
        dtype=st.sampled_from(DTYPES),
        rows=st.sampled_from([1, 2, ops.FEW_ROWS]),
        bias=st.booleans(),
        seed=SEED,
        **FACTORS,
        **STORAGE,
    )
    @EXAMPLES
    def test_add_low_rank(self, dtype: torch.dtype, rows: int, bias: bool, r: int, m: int, seed: int, **storage: Any):
        U, s, o = factor(r, m, seed, **storage)
        shapes = ((rows, m), (rows, r), (m,))
        y, h, b = (draw(*shape, seed=seed + i, dtype=dtype).to(DEVICE) for i, shape in enumerate(shapes))
        B = nf4.dequantize(U).double() * s.double()[:, None] * o.double()
        expected = y.double() + h.double() @ B + b.double() * bias
        magnitude = y.double().abs() + h.double().abs() @ B.abs() + b.double().abs() * bias
        with ops.fused():
            ops.add_low_rank_(y, h, U, s, o, b if bias else None)
        # r terms of three rounded products each and two more, added in any order; one rounding to the dtype.
        info = torch.finfo(dtype)
        u = info.eps if INTERPRETED else info.eps / 2
        sums = (r + 5) * V32 * magnitude
        assert_close(y, expected, sums + u * (expected.abs() + sums) + info.tiny * info.eps, "y")

    @pytest.mark.usefixtures("float32_sums")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if INTERPRETED else DTYPES)
    @pytest.mark.parametrize("rows", [3, 40])
    @pytest.mark.parametrize("m", [96, 90])
    def test_layer(self, m: int, rows: int, dtype: torch.dtype, launched: list[str]):
        """Output and gradients, within the tolerances of the plain layer; which kernels run."""
        layer = build(70, m, 24, device=DEVICE)
        with ops.fused(False):
            check(layer, rows, dtype, 0)
        assert not launched
        with ops.fused():
            check(layer, rows, dtype, 0)
        expected = {"dequantize"}
        if m % 32 == 0:
            expected |= {"vector_gradients"} | ({"add_low_rank"} if rows <= ops.FEW_ROWS else set())
        assert set(launched) == expected

    def test_layer_runs_alike_each_time(self):
        layer = build(64, 96, 24, device=DEVICE)
        x = draw(40, 64, seed=0, dtype=torch.float32).to(DEVICE)
        s, o = vectors(layer)
        runs = []
        for _ in range(2):
            with ops.fused():
                y = layer.apply_vectors(x, s, o)
                runs.append((y, *torch.autograd.grad(y.square().sum(), (s, o))))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter, and is in it")
@pytest.mark.slow
def test_in_the_interpreter(seed: int):
    pytest.importorskip("triton")
    tests = f"{Path(__file__)}::{TestOnADevice.__name__}"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--seed", str(seed), tests],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout)
    assert "skipped" not in run.stdout


class NoGPU:
    """A Triton driver that compiles for a GPU and has none."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 + self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.slow
def test_all_launches_compile(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Each launch that a layer makes compiles to machine code, with the roundings of the plain code."""
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
    U, s, o = factor(100, 96, 0)
    y, h = torch.empty(4, 96, dtype=torch.bfloat16), torch.empty(4, 100, dtype=torch.bfloat16)
    compiled = []

    class Compile:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *args, **options: compiled.append(self.kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGPU(capability))
    kernels = ops._triton()
    with ops.fused():
        monkeypatch.setattr(kernels, "INTERPRETED", True)  # CPU tensors shall pass
        for name in ("dequantize", "vector_gradients", "add_low_rank"):
            monkeypatch.setattr(kernels, name, Compile(getattr(kernels, name)))
        ops.dequantize(U, torch.bfloat16)
        ops.scaled_U(U, s, o, torch.bfloat16)
        ops.vector_gradients(torch.empty(100, 96), U, s, o)
        ops.add_low_rank_(y, h, U, s, o, y[0])
    assert [kernel.metadata.name for kernel in compiled] == [
        "dequantize",
        "dequantize",
        "vector_gradients",
        "add_low_rank",
    ]
    for kernel in compiled:
        assert kernel.metadata.target.arch == capability
        assert kernel.asm["cubin"]
        ptx = kernel.asm["ptx"]
        assert "fma." not in ptx, f"{kernel.metadata.name}: a product and a sum are rounded once"
        assert "atom." not in ptx, f"{kernel.metadata.name}: the order of additions is open"
        if kernel.metadata.name != "vector_gradients":
            assert "cvt.rn.bf16" in ptx, f"{kernel.metadata.name}: not rounded to the nearest"

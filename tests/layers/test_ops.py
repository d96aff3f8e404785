"""The plain operations of a layer against float64, and the switch to fused kernels."""

from __future__ import annotations

import sys

import pytest
import torch
from linear_checks import DTYPES, build, draw, vectors
from torch import Tensor

import qosora
from qosora.decompose import nf4
from qosora.decompose.nf4 import FourBitTensor
from qosora.errors import QosoraError
from qosora.layers import ops
from qosora.layers.device import planning_for

V32 = 2.0**-24  # unit roundoff of float32


class TestTheSwitch:
    def test_needs_triton(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "qosora.layers.triton_ops", raising=False)
        monkeypatch.delattr(qosora.layers, "triton_ops", raising=False)
        with pytest.raises(
            QosoraError, match=r"need triton, which cannot be imported here .*leave the choice to qosora"
        ):
            ops.fused().__enter__()
        assert ops._wanted is None

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_needs_cuda(self, device: str):
        pytest.importorskip("triton")
        layer = build(64, 64, 8).to(device)
        x = torch.randn(3, 64, device=device)
        expected = layer(x)
        with pytest.raises(QosoraError, match=f"run on CUDA devices, got a tensor on '{device}'"), ops.fused():
            layer(x)
        again = layer(x)  # the error has left the block
        assert device == "meta" or torch.equal(again, expected)

    def test_planning_for_a_gpu_takes_the_kernels_ways(self, launched: list[str], monkeypatch: pytest.MonkeyPatch):
        """On the meta device nothing runs, and what would on a GPU is allocated."""
        monkeypatch.setattr(ops, "_working", lambda: True)
        layer = build(64, 96, 8).to("meta")
        for device, kernels in (("cuda", {"dequantize", "vector_gradients"}), ("cpu", set())):
            launched.clear()
            x, s, o = torch.empty(40, 64, device="meta", requires_grad=True), *vectors(layer)
            with planning_for(device):
                layer.apply_vectors(x, s, o).sum().backward()
            assert set(launched) == kernels
            assert (x.grad is not None, s.grad is not None) == (True, True)

    def test_a_gpu_on_which_they_fail_runs_the_plain_code(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no C compiler\nmore")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "linspace", fail)
        assert not ops._working.__wrapped__()
        assert "do not work here: no C compiler" in caplog.text
        assert ops._wanted is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_and_scaled_U_are_those_of_each(dtype: torch.dtype):
    U = nf4.quantize(draw(12, 64, seed=0, dtype=torch.float32))
    s, o = (draw(n, seed=n, dtype=torch.float32) for n in (12, 64))
    P = draw(12, 64, seed=1, dtype=torch.float32)
    with ops.fused(False):
        ds, do, B = ops.gradients_and_scaled_U(P.clone(), U, s, o, dtype)
        expected = (*ops.vector_gradients(P.clone(), U, s, o), ops.scaled_U(U, s, o, dtype))
    assert all(torch.equal(a, b) for a, b in zip((ds, do, B), expected, strict=True))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
class TestPlain:
    """Against float64, within the roundings that each makes: unit roundoff V32 in float32, u in the dtype."""

    r, m, rows = 12, 70, 5

    def operands(self, double_quant: bool, seed: int) -> tuple[FourBitTensor, Tensor, Tensor, Tensor]:
        """U in 4 bits, s, o, and U as float64."""
        U = nf4.quantize(draw(self.r, self.m, seed=seed, dtype=torch.float32), double_quant=double_quant)
        s, o = (draw(n, seed=seed + n, dtype=torch.float32) for n in (self.r, self.m))
        return U, s, o, nf4.dequantize(U).double()

    def test_scaled_U_is_rounded_once(self, dtype: torch.dtype, double_quant: bool, seed: int):
        U, s, o, exact = self.operands(double_quant, seed)
        B = exact * s.double()[:, None] * o.double()
        got = ops.scaled_U(U, s, o, dtype)
        info = torch.finfo(dtype)
        assert got.dtype == dtype
        assert ((got.double() - B).abs() <= (2 * V32 + info.eps / 2) * 1.01 * B.abs() + info.tiny * info.eps).all()

    def test_vector_gradients(self, dtype: torch.dtype, double_quant: bool, seed: int):
        U, s, o, exact = self.operands(double_quant, seed)
        P = draw(self.r, self.m, seed=seed + 1, dtype=dtype).float()
        ds, do = ops.vector_gradients(P.clone(), U, s, o)
        terms_s, terms_o = P.double() * exact * o.double(), P.double() * exact * s.double()[:, None]
        assert ((ds - terms_s.sum(1)).abs() <= (self.m + 2) * V32 * terms_s.abs().sum(1)).all()
        assert ((do - terms_o.sum(0)).abs() <= (self.r + 2) * V32 * terms_o.abs().sum(0)).all()

    @pytest.mark.parametrize("bias", [True, False])
    def test_add_low_rank_is_in_place(self, dtype: torch.dtype, double_quant: bool, bias: bool, seed: int):
        U, s, o, _ = self.operands(double_quant, seed)
        shapes = ((self.rows, self.m), (self.rows, self.r), (self.m,))
        y, h, b = (draw(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes))
        B = ops.scaled_U(U, s, o, dtype).double()
        expected = y.double() + h.double() @ B + b.double() * bias
        magnitude = y.double().abs() + h.double().abs() @ B.abs() + b.double().abs() * bias
        ops.add_low_rank_(y, h, U, s, o, b if bias else None)
        # r + 2 terms added in any order; the product, its sum with y and that with b may each be rounded to the dtype
        u = torch.finfo(dtype).eps / 2
        assert ((y.double() - expected).abs() <= ((self.r + 2) * V32 + 3.01 * u) * magnitude).all()

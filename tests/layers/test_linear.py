"""The layer: its output, gradients, graph, shapes and storage."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from linear_checks import build, grad, vectors
from reference import array
from torch import nn

from qosora.decompose.factorize import factorize
from qosora.errors import QosoraError
from qosora.layers.linear import QosoraLinear, qosora_modules

V32 = 2.0**-24  # unit roundoff of float32
STATISTICS = ("weight_absmax_scale", "U_absmax_scale", "V_absmax_scale", "weight_absmax_offset", "s", "o")


class TestShapes:
    @pytest.mark.parametrize("shape", [(64,), (1, 64), (7, 64), (2, 3, 64), (2, 1, 3, 64), (1, 1, 64)])
    @pytest.mark.parametrize("train", [True, False])
    def test_leading_dimensions(self, shape: tuple[int, ...], train: bool):
        layer, x = build(64, 48, 8), torch.randn(shape).requires_grad_(train)
        y = layer(x)
        assert y.shape == (*shape[:-1], 48)
        rows = layer(x.detach().reshape(-1, 64))
        assert torch.allclose(y.detach().reshape(-1, 48), rows, rtol=0, atol=1e-5)
        if train:
            y.sum().backward()
            assert grad(x).shape == shape

    @pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
    def test_empty_batch(self, shape: tuple[int, ...]):
        """An expert of a mixture may get no token."""
        layer, x = build(64, 48, 8), torch.randn(shape, requires_grad=True)
        s, o = vectors(layer)
        y = layer.apply_vectors(x, s, o)
        assert y.shape == (*shape[:-1], 48)
        y.sum().backward()
        assert grad(x).shape == shape
        assert not grad(s).any()
        assert not grad(o).any()
        assert layer(x.detach()).shape == y.shape

    def test_a_strided_input(self):
        layer, x = build(64, 48, 8), torch.randn(64, 5).T
        for train in (True, False):
            got, expected = (layer(t.requires_grad_(train)).detach() for t in (x.detach(), x.detach().clone()))
            assert torch.allclose(got, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("shape", [(64, 48), (70, 50)])
    def test_forward_and_backward_on_meta(self, shape: tuple[int, int]):
        """The memory planner traces the layer without data."""
        n, m = shape
        layer, x = build(n, m, 8).to("meta"), torch.randn(5, n, device="meta", dtype=torch.bfloat16, requires_grad=True)
        s, o = vectors(layer)
        layer.apply_vectors(x, s, o).sum().backward()
        assert (grad(x).shape, grad(s).shape, grad(o).shape) == ((5, n), (8,), (m,))
        assert grad(x).is_meta
        with torch.no_grad():
            assert layer(x).shape == (5, m)

    def test_rank_is_clipped(self):
        assert QosoraLinear(20, 30, rank=64).rank == 20

    def test_meta(self):
        """Parameters of a real size, counted without memory."""
        layer = QosoraLinear(4096, 11008, False, rank=128, device="meta")
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        assert shapes["weight"] == (4096 * 11008 // 2,)
        assert shapes["U_absmax"] == (128 * 11008 // 64,)
        assert (shapes["s"], shapes["o"]) == ((128,), (11008,))
        assert "bias" not in shapes


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(cpu, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "double": lambda m: m.double(),
}


class TestStorage:
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_state_dict_round_trip(self, bias: bool, double_quant: bool):
        layer = build(70, 50, 8, bias=bias, double_quant=double_quant)
        other = QosoraLinear(70, 50, bias, rank=8, double_quant=double_quant)
        state = layer.state_dict()
        assert set(state) == set(layer.state_of(layer.factors)) | ({"bias"} if bias else set())
        for assign in (False, True):
            other.load_state_dict(copy.deepcopy(state), assign=assign)
            loaded = other.state_dict()
            assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in state.items())
            x = torch.randn(3, 70)
            assert torch.equal(layer(x), other(x))

    def test_set_factors(self):
        weight = torch.randn(50, 70)
        factors = factorize(weight, 8)
        layer = build(70, 50, 8)
        layer.set_factors(factors)
        assert torch.equal(layer.s, factors.sigma)
        assert torch.equal(layer.o, torch.ones(50))
        stored = layer.factors
        for part in ("residual", "U", "V"):
            pairs = zip(getattr(stored, part).tensors().items(), getattr(factors, part).tensors().items(), strict=True)
            assert all(a == b and torch.equal(t, u) for (a, t), (b, u) in pairs)
        assert stored.nbytes == factors.nbytes

    def test_factors_of_another_shape_are_refused(self):
        with pytest.raises(RuntimeError):
            QosoraLinear(70, 50, rank=9).set_factors(factorize(torch.randn(50, 70), 8))

    def test_dequantize(self, seed: int):
        layer = build(70, 50, 8, seed=seed)
        R, U, V = (reference.dequantize(q) for q in (layer.factors.residual, layer.factors.U, layer.factors.V))
        s, o = torch.rand(8), torch.randn(50)
        for pair in ((), (s, o)):
            used_s, used_o = (array(v) for v in (pair or (layer.s, layer.o)))
            expected = reference.Layer(R.value, U.value, V.value, used_s, used_o).weight()
            size = R.magnitude + np.abs(used_o)[:, None] * ((U.magnitude.T * np.abs(used_s)) @ V.magnitude)
            # 3 roundings of each stored value, 2 of the scaling, a sum of 8 products and R.
            assert (np.abs(array(layer.dequantize(*pair)) - expected) <= (8 + 9) * V32 * size).all()
        assert not layer.dequantize().requires_grad

    @pytest.mark.parametrize("cast", CASTS)
    def test_float32_stays_float32(self, cast: str):
        model = nn.Sequential(build(70, 50, 8), nn.Linear(50, 4))
        before = copy.deepcopy(model.state_dict())
        CASTS[cast](model)
        other = model[1].weight.dtype
        assert other != torch.float32
        assert model[0].bias.dtype == other
        for name, tensor in model[0].state_dict().items():
            if name != "bias":
                assert tensor.dtype == before[f"0.{name}"].dtype
                assert torch.equal(tensor, before[f"0.{name}"])
        assert all(model[0].get_parameter(name).dtype == torch.float32 for name in STATISTICS)
        assert not any(p.requires_grad for p in model[0].parameters())

    def test_a_cast_keeps_parameters_that_an_optimizer_may_hold(self):
        layer = build(70, 50, 8)
        layer.s.requires_grad_().grad = torch.ones(8)
        held, value = layer.s, layer.s.detach().clone()
        layer.to(torch.bfloat16)
        assert layer.s is held
        assert torch.equal(held, value)
        assert torch.equal(grad(held), torch.ones(8))
        assert grad(held).dtype == torch.float32

    def test_float32_stays_float32_on_meta(self):
        for move in (lambda m: m.to("meta"), lambda m: m.to("meta", torch.bfloat16), lambda m: m.to("meta").bfloat16()):
            layer = move(build(70, 50, 8))
            assert all(p.is_meta for p in layer.parameters())
            assert all(layer.get_parameter(name).dtype == torch.float32 for name in STATISTICS)
            layer.to_empty(device="cpu")
            assert all(layer.get_parameter(name).dtype == torch.float32 for name in STATISTICS)

    def test_a_copy_is_its_own(self):
        layer = build(70, 50, 8)
        twin, x = copy.deepcopy(layer), torch.randn(3, 70)
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.s.zero_()
        assert layer.s.all()

    def test_data_parallel_is_refused(self):
        with pytest.raises(QosoraError, match="CUDA_VISIBLE_DEVICES=0"):
            QosoraLinear(8, 8, rank=2)._replicate_for_data_parallel()

    def test_qosora_modules(self):
        model = nn.Sequential(build(8, 8, 2), nn.Linear(8, 8), nn.Sequential(build(8, 8, 2)))
        assert list(qosora_modules(model)) == ["0", "2.0"]
        assert qosora_modules(model)["2.0"] is model.get_submodule("2.0")

    def test_repr(self):
        text = repr(build(70, 50, 8))
        assert "in_features=70, out_features=50, bias=True, rank=8, quant_type=nf4, blocksize=64" in text

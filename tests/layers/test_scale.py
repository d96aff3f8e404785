"""A layer that multiplies its input: against the float64 reference, on every way that computes it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_checks import DTYPES, assert_within, build, check, draw, expect, grad, vectors
from reference import array
from torch.utils.checkpoint import checkpoint

from qosora.decompose import nf4
from qosora.layers.linear import QosoraLinear

LAYERS = {
    "n": st.one_of(st.integers(1, 90), st.sampled_from([64, 128])),
    "m": st.one_of(st.integers(1, 90), st.sampled_from([64, 128])),
    "rank": st.integers(1, 40),
    "rows": st.integers(1, 9),
    "bias": st.booleans(),
    "quant_type": st.sampled_from(nf4.QUANT_TYPES),
    "blocksize": st.sampled_from(nf4.BLOCKSIZES),
    "double_quant": st.booleans(),
    "seed": st.integers(0, 2**32),
}


def make(n: int = 64, m: int = 96, rank: int = 8, **options: Any) -> QosoraLinear:
    return build(n, m, rank, scale="columns", **options)


def scale_of(layer: QosoraLinear) -> torch.Tensor:
    assert layer.c is not None
    return layer.c


class TestAgainstTheReference:
    @given(dtype=st.sampled_from(DTYPES), **LAYERS)
    @settings(max_examples=40)
    def test_output_and_gradients(
        self, dtype: torch.dtype, n: int, m: int, rank: int, rows: int, bias: bool, seed: int, **storage: Any
    ):
        check(make(n=n, m=m, rank=rank, bias=bias, seed=seed, **storage), rows, dtype, seed)

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_autocast(self, dtype: torch.dtype):
        check(make(), 5, dtype, 0, autocast=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_saving_first(self, dtype: torch.dtype):
        layer = make()
        layer.saves_first = True
        check(layer, 5, dtype, 0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_is_kept_for_generation(self, dtype: torch.dtype):
        layer = make().eval()
        x, g = draw(2, 64, seed=0, dtype=dtype), draw(2, 96, seed=1, dtype=dtype)
        e = expect(layer, x, g, dtype)
        with torch.no_grad():
            y = layer(x)
        assert layer._kept is not None
        assert_within(y, e.y, e.y_tolerance, "y")

    def test_weight(self):
        layer = make()
        R, U, V = (reference.dequantize(q).value for q in (layer.factors.residual, layer.factors.U, layer.factors.V))
        model = reference.Layer(R, U, V, array(layer.s), array(layer.o))
        expected = np.stack([row * array(scale_of(layer)) for row in model.weight()])
        np.testing.assert_allclose(array(layer.dequantize()), expected, rtol=1e-5, atol=1e-6)


class TestExactness:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_is_the_plain_layer_of_the_multiplied_input(self, dtype: torch.dtype):
        layer, plain = make(), make()
        plain.c = None
        x, g = draw(5, 64, seed=0, dtype=dtype), draw(5, 96, seed=1, dtype=dtype)
        a, b = x.clone().requires_grad_(), (x * scale_of(layer)).to(dtype).requires_grad_()
        (s, o), (t, p) = vectors(layer), vectors(plain)
        y, z = layer.apply_vectors(a, s, o), plain.apply_vectors(b, t, p)
        y.backward(g)
        z.backward(g)
        assert torch.equal(y, z)
        assert torch.equal(grad(s), grad(t))
        assert torch.equal(grad(o), grad(p))
        assert torch.equal(grad(a), (grad(b) * scale_of(layer)).to(dtype))

    def test_compiled(self):
        layer = make()
        x, g = draw(5, 64, seed=0, dtype=torch.float32), draw(5, 96, seed=1, dtype=torch.float32)
        found = []
        for call in (layer.apply_vectors, torch.compile(layer.apply_vectors, backend="aot_eager", fullgraph=True)):
            inputs = x.clone().requires_grad_(), *vectors(layer)
            y = call(*inputs)
            y.backward(g)
            found.append((y, *(grad(t) for t in inputs)))
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("saves_first", [False, True])
def test_checkpointed(saves_first: bool):
    layer = make()
    layer.saves_first = saves_first
    x, g = draw(5, 64, seed=0, dtype=torch.bfloat16), draw(5, 96, seed=1, dtype=torch.bfloat16)
    found = []
    for call in (layer.apply_vectors, partial(checkpoint, layer.apply_vectors, use_reentrant=False)):
        inputs = x.clone().requires_grad_(), *vectors(layer)
        y = call(*inputs)
        y.backward(g)
        found.append((y, *(t.grad for t in inputs)))
    assert all(map(torch.equal, *found))


def test_the_input_is_not_saved():
    layer = make(n=128)
    x = torch.randn(50, 128, requires_grad=True)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer.apply_vectors(x, *vectors(layer))
    assert (50, 128) not in saved
    assert (50, 8) in saved


class TestStorage:
    def test_without_a_scale_nothing_is_there(self):
        assert "c" not in QosoraLinear(8, 8, rank=2).state_dict()
        assert make().state_dict()["c"].shape == (64,)

    def test_stays_float32(self):
        layer = make()
        c = scale_of(layer).clone()
        assert torch.equal(scale_of(layer.to(torch.bfloat16)), c)

    def test_round_trip_of_factors(self):
        layer = make()
        other = QosoraLinear(64, 96, rank=8, has_scale=True)
        other.set_factors(layer.factors)
        assert torch.equal(scale_of(other), scale_of(layer))

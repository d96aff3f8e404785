"""The product of a decomposed layer against a float64 reference: output, gradients, and what it keeps for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_checks import DTYPES, build, check, draw, expect, grad, vectors
from reference import array
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qosora.decompose import nf4
from qosora.layers.linear import QosoraLinear

LAMBDA = 6.0
V32 = 2.0**-24  # unit roundoff of float32
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


def bias(layer: QosoraLinear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


class TestAgainstTheReference:
    @given(dtype=st.sampled_from(DTYPES), **LAYERS)
    @settings(max_examples=60)
    def test_output_and_gradients(
        self, dtype: torch.dtype, n: int, m: int, rank: int, rows: int, bias: bool, seed: int, **storage: Any
    ):
        check(build(n, m, rank, bias=bias, seed=seed, **storage), rows, dtype, seed)

    @given(dtype=st.sampled_from(DTYPES[1:]), autocast=st.booleans(), **LAYERS)
    @settings(max_examples=25)
    def test_float32_input_computed_in_16_bits(
        self,
        dtype: torch.dtype,
        autocast: bool,
        n: int,
        m: int,
        rank: int,
        rows: int,
        bias: bool,
        seed: int,
        **storage: Any,
    ):
        compute_dtype = None if autocast else dtype
        layer = build(n, m, rank, bias=bias, seed=seed, compute_dtype=compute_dtype, **storage)
        check(layer, rows, dtype, seed, autocast)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [256, 250])
    def test_a_larger_layer(self, n: int, dtype: torch.dtype, seed: int):
        check(build(n, 192, 48, seed=seed), 40, dtype, seed)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_tolerances_catch_mistakes(self, dtype: torch.dtype, seed: int):
        """Each of these wrong formulas is out of tolerance in a third of the entries or more, in all dtypes."""
        layer = build(96, 80, 16, seed=seed)
        x, g = (draw(8, size, seed=seed + size, dtype=dtype) for size in (96, 80))
        e = expect(layer, x, g, dtype)
        f = layer.factors
        R, U, V = (reference.dequantize(q).value for q in (f.residual, f.U, f.V))
        s, o, b, X, G = array(layer.s), array(layer.o), array(bias(layer)), array(x), array(g)
        H = X @ V.T
        wrong = {
            "y without o": (X @ R.T + H @ (U * s[:, None]) + b, e.y, e.y_tolerance),
            "y with o on the residual, too": (
                X @ (R * o[:, None]).T + H @ (U * s[:, None] * o) + b,
                e.y,
                e.y_tolerance,
            ),
            "y without bias": (e.y - b, e.y, e.y_tolerance),
            "dx without the residual": (G @ (U * s[:, None] * o).T @ V, e.dx, e.dx_tolerance),
            "ds without o": (((H.T @ G) * U).sum(1), e.ds, e.ds_tolerance),
            "ds with s": (e.ds * s, e.ds, e.ds_tolerance),
            "do without s": (((H.T @ G) * U).sum(0), e.do, e.do_tolerance),
            "do with o": (e.do * o, e.do, e.do_tolerance),
        }
        for name, (got, expected, tolerance) in wrong.items():
            assert (np.abs(got - expected) > tolerance).mean() > 1 / 3, name

    def test_the_reference_gradients_are_those_of_its_output(self, seed: int):
        """The output is linear in each of x, s and o, so differences of it are its gradients."""
        random = np.random.default_rng(seed)
        m, n, r, T = 5, 7, 3, 4
        parts = [random.normal(size=shape) for shape in ((m, n), (r, m), (r, n), (r,), (m,), (m,))]
        layer, x, g = reference.Layer(*parts), random.normal(size=(T, n)), random.normal(size=(T, m))
        dx, ds, do = layer.gradients(x, g)
        loss = np.sum(g * layer.output(x))
        for k in range(r):
            moved = layer._replace(s=layer.s + np.eye(r)[k])
            assert np.sum(g * moved.output(x)) - loss == pytest.approx(ds[k])
        for j in range(m):
            moved = layer._replace(o=layer.o + np.eye(m)[j])
            assert np.sum(g * moved.output(x)) - loss == pytest.approx(do[j])
        for t in range(T):
            for i in range(n):
                step = np.zeros(x.shape)
                step[t, i] = 1
                assert np.sum(g * layer.output(x + step)) - loss == pytest.approx(dx[t, i])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients_equal_autograd(self, dtype: torch.dtype, seed: int):
        """The hand-written backward in float32 against autograd through the dense weight in float64."""
        layer = build(70, 50, 12, seed=seed)
        x, s, o = draw(6, 70, seed=seed, dtype=dtype).float().requires_grad_(), *vectors(layer)
        layer.apply_vectors(x, s, o).square().sum().backward()
        f = layer.factors
        R, U, V = (nf4.dequantize(q).double() for q in (f.residual, f.U, f.V))
        leaves = [t.detach().double().requires_grad_() for t in (x, s, o)]
        x64, s64, o64 = leaves
        (x64 @ (R + o64[:, None] * (U.T * s64 @ V)).T + bias(layer)).square().sum().backward()
        for got, expected in zip((x, s, o), leaves, strict=True):
            assert torch.linalg.norm(grad(got) - grad(expected)) < 1e-6 * torch.linalg.norm(grad(expected))

    @pytest.mark.gpu
    @pytest.mark.usefixtures("float32_sums")
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [128, 90])
    def test_cuda(self, n: int, dtype: torch.dtype, seed: int):
        layer = build(n, 96, 24, seed=seed, device="cuda")
        for rows in (1, 4, 64):
            check(layer, rows, dtype, seed)
            if dtype != torch.float32:
                check(layer, rows, dtype, seed, autocast=True)


class TestSmallUpdates:
    """A vector that moves by less than bfloat16 resolves still moves the output: the reason for scaling in float32."""

    RELATIVE = 1e-4

    def slopes(self, vector: str, seed: int, apply: Callable[..., Tensor]) -> Tensor:
        """Observed changes of the output regressed on the true ones, over draws: one entry of s moves, or all of o.

        The vector that moves starts where vectors kept in bfloat16 would be.
        """
        n, m, rank = 16, 2048, 2
        layer = build(n, m, rank, bias=False, seed=seed, compute_dtype=torch.bfloat16)
        U, V = (nf4.dequantize(q).double() for q in (layer.factors.U, layer.factors.V))
        slopes = []
        for i in range(600):
            x, s, o = torch.randn(8, n).bfloat16().float(), 1 + torch.rand(rank), 1 + 0.3 * torch.randn(m)
            if vector == "s":
                s = s.bfloat16().float()
                s_moved, o_moved = s.clone(), o
                s_moved[i % rank] *= 1 + self.RELATIVE
            else:
                o = o.bfloat16().float()
                s_moved, o_moved = s, o * (1 + self.RELATIVE)
            observed = apply(layer, x, s_moved, o_moved) - apply(layer, x, s, o)
            change = s_moved.double()[:, None] * o_moved.double() - s.double()[:, None] * o.double()
            true = x.double() @ V.T @ (U * change)
            slopes.append((observed * true).sum() / true.square().sum())
        return torch.stack(slopes)

    @pytest.mark.parametrize(("vector", "training"), [("s", True), ("s", False), ("o", True)])
    def test_it_changes_the_output_by_what_it_should_on_average(self, vector: str, training: bool, seed: int):
        """An entry of B moves by a whole unit in the last place or not at all, and by the true amount on average.

        An entry moves with a probability of about p = 1e-4 / 2⁻⁷ = 1/80, so the average of N = 600 · 2048 of them is
        known to 1 / sqrt(N p) = 0.8 %; weighting by their squares, and the rounding of y, make that 2 to 3 %.
        """

        def apply(layer: QosoraLinear, x: Tensor, s: Tensor, o: Tensor) -> Tensor:
            return layer.apply_vectors(x, s.clone().requires_grad_(training), o).detach()

        slopes = self.slopes(vector, seed, apply)
        error = float(slopes.std() / len(slopes) ** 0.5)
        assert error < 0.03, "the measurement is too coarse to mean anything"
        assert abs(float(slopes.mean()) - 1) < 4 * error

    @pytest.mark.parametrize("vector", ["s", "o"])
    def test_rounding_the_vector_instead_would_lose_it(self, vector: str, seed: int):
        def apply(layer: QosoraLinear, x: Tensor, s: Tensor, o: Tensor) -> Tensor:
            rounded = {"s": s, "o": o, vector: {"s": s, "o": o}[vector].bfloat16().float()}
            return layer.apply_vectors(x, rounded["s"], rounded["o"])

        assert (self.slopes(vector, seed, apply) == 0).all()

    def test_many_small_steps_add_up(self, seed: int):
        """100 steps of 1e-4 move the output by 1 %, and a float32 vector holds them."""
        layer = build(64, 256, 1, bias=False, seed=seed, compute_dtype=torch.bfloat16)
        s = layer.s.clone()
        for _ in range(100):
            s *= 1 + self.RELATIVE
        factor = (1 + self.RELATIVE) ** 100
        assert float(s / layer.s) == pytest.approx(factor, rel=200 * V32)
        x = draw(32, 64, seed=seed, dtype=torch.bfloat16).float()
        with torch.no_grad():
            base = x @ nf4.dequantize(layer.factors.residual).T
            before, after = (layer.apply_vectors(x, v, layer.o) - base for v in (layer.s, s))
        slope = float((before * after).sum() / before.square().sum())
        # Both numbers depend on the rounding of B's 256 entries, 2⁻⁸ at most each: over their average, five times that
        # for each of the two (the 8,192 outputs are rounded as much, and more of them average).
        assert slope == pytest.approx(factor, abs=5 * 2 * 2.0**-8 / 256**0.5)


class TestGraph:
    def test_frozen_parameters_receive_no_gradients(self):
        layer = build(64, 48, 8)
        assert not any(p.requires_grad for p in layer.parameters())
        x, (s, o) = torch.randn(5, 64, requires_grad=True), vectors(layer)
        before = {name: p.clone() for name, p in layer.named_parameters()}
        layer.apply_vectors(x, s, o).sum().backward()
        assert all(p.grad is None for p in layer.parameters())
        assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
        layer(x.detach().requires_grad_()).sum().backward()
        assert all(p.grad is None for p in layer.parameters())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_no_graph_in_inference(self, mode: Callable[[], Any]):
        layer = build(64, 48, 8)
        with mode():
            y = layer.apply_vectors(torch.randn(5, 64), *vectors(layer))
        assert y.grad_fn is None
        assert not y.requires_grad

    def test_no_graph_where_nothing_is_trained(self):
        assert build(64, 48, 8)(torch.randn(5, 64)).grad_fn is None

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("trained", ["both", "s", "o", "none"])
    def test_saves_h_and_not_x(self, trained: str, dtype: torch.dtype):
        rows, n, m, rank = 40, 128, 96, 8
        layer, x = build(n, m, rank), draw(rows, n, seed=0, dtype=dtype).requires_grad_()
        s, o = vectors(layer)
        s.requires_grad_(trained in ("both", "s"))
        o.requires_grad_(trained in ("both", "o"))
        saved: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer.apply_vectors(x, s, o)
        h_bytes = 0 if trained == "none" else rows * rank * dtype.itemsize
        assert sum(t.nbytes for t in saved) == h_bytes + 4 * (rank + m)
        assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in saved)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in saved), "a view keeps a larger tensor alive"

    @pytest.mark.parametrize("wanted", ["x", "s", "o"])
    def test_computes_only_the_gradients_that_are_asked_for(self, wanted: str, monkeypatch: pytest.MonkeyPatch):
        layer = build(64, 48, 8)
        leaves = dict(zip("xso", (torch.randn(5, 64), layer.s.clone(), layer.o.clone()), strict=True))
        leaves[wanted].requires_grad_()
        y = layer.apply_vectors(*leaves.values())
        decoded: list[tuple[int, ...]] = []
        dequantize = nf4.dequantize

        def recorded(q: nf4.FourBitTensor, *args: Any) -> Tensor:
            decoded.append(q.shape)
            return dequantize(q, *args)

        monkeypatch.setattr(nf4, "dequantize", recorded)
        y.sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {wanted}
        residual_decoded = (48, 64) in decoded
        assert residual_decoded == (wanted == "x")

    @pytest.mark.parametrize("backward_in_autocast", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_autocast(self, dtype: torch.dtype, backward_in_autocast: bool, seed: int):
        """Under autocast a float32 input gives what the same layer gives in 16 bits; and wherever backward runs."""
        layer = build(96, 80, 8, seed=seed)
        x, g = draw(6, 96, seed=seed, dtype=dtype), draw(6, 80, seed=seed + 1, dtype=dtype)
        grads = []
        for autocast in (False, True):
            leaf = (x.float() if autocast else x).clone().requires_grad_()
            s, o = vectors(layer)
            with torch.autocast("cpu", dtype, enabled=autocast):
                y = layer.apply_vectors(leaf, s, o)
                assert y.dtype == dtype
                if backward_in_autocast:
                    y.backward(g)
            if not backward_in_autocast:
                y.backward(g)
            grads.append((y.detach(), grad(leaf).to(dtype), grad(s), grad(o)))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_gradient_checkpointing_gives_identical_gradients(self, autocast: bool):
        """Inputs need no gradient: what usually breaks checkpointing of frozen models."""
        layers = [build(64, 64, 8, seed=i) for i in range(3)]
        pairs = [vectors(layer) for layer in layers]
        x = torch.randn(10, 64)

        def run(checkpointed: bool) -> list[Tensor]:
            for vector in sum(pairs, ()):
                vector.grad = None
            y = x
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for layer, pair in zip(layers, pairs, strict=True):

                    def block(y: Tensor, layer=layer, pair=pair) -> Tensor:
                        return torch.tanh(layer.apply_vectors(y, *pair))

                    y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
            y.float().square().sum().backward()
            return [y.detach(), *(grad(vector) for vector in sum(pairs, ()))]

        assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))

    def test_twice_differentiating_is_refused(self):
        layer, x = build(32, 24, 4), torch.randn(3, 32, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()

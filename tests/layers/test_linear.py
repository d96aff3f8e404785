"""The layer: its output, gradients, graph, shapes and storage."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_checks import DTYPES, build, check, draw, expect, vectors
from reference import array
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qosora.decompose import nf4
from qosora.decompose.factorize import factorize
from qosora.errors import QosoraError
from qosora.layers import linear
from qosora.layers.linear import QosoraLinear, qosora_modules

LAMBDA = 6.0
V32 = 2.0**-24  # unit roundoff of float32
STATISTICS = ("weight_absmax_scale", "U_absmax_scale", "V_absmax_scale", "weight_absmax_offset", "s", "o")


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


class TestAgainstTheReference:
    @given(dtype=st.sampled_from(DTYPES), **LAYERS)
    @settings(max_examples=60)
    def test_output_and_gradients(
        self, dtype: torch.dtype, n: int, m: int, rank: int, rows: int, bias: bool, seed: int, **storage: object
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
        **storage: object,
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
        s, o, b, X, G = array(layer.s), array(layer.o), array(layer.bias), array(x), array(g)
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
        (x64 @ (R + o64[:, None] * (U.T * s64 @ V)).T + layer.bias).square().sum().backward()
        for got, expected in zip((x, s, o), leaves, strict=True):
            assert torch.linalg.norm(got.grad - expected.grad) < 1e-6 * torch.linalg.norm(expected.grad)

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
        n, m, rank = 64, 2048, 2
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
    def test_no_graph_in_inference(self, mode: Callable):
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
        decoded = []
        dequantize = nf4.dequantize
        monkeypatch.setattr(linear.nf4, "dequantize", lambda q, *a: decoded.append(q.shape) or dequantize(q, *a))
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
            grads.append((y.detach(), leaf.grad.to(dtype), s.grad, o.grad))
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
            return [y.detach(), *(vector.grad for vector in sum(pairs, ()))]

        assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))

    def test_twice_differentiating_is_refused(self):
        layer, x = build(32, 24, 4), torch.randn(3, 32, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


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
            assert x.grad.shape == shape

    @pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
    def test_empty_batch(self, shape: tuple[int, ...]):
        """An expert of a mixture may get no token."""
        layer, x = build(64, 48, 8), torch.randn(shape, requires_grad=True)
        s, o = vectors(layer)
        y = layer.apply_vectors(x, s, o)
        assert y.shape == (*shape[:-1], 48)
        y.sum().backward()
        assert x.grad.shape == shape
        assert not s.grad.any()
        assert not o.grad.any()
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
        assert (x.grad.shape, s.grad.shape, o.grad.shape) == ((5, n), (8,), (m,))
        assert x.grad.is_meta
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
        assert set(state) == set(QosoraLinear.state_of(layer.factors)) | ({"bias"} if bias else set())
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
        assert torch.equal(held.grad, torch.ones(8))
        assert held.grad.dtype == torch.float32

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
        assert qosora_modules(model)["2.0"] is model[2][0]

    def test_repr(self):
        text = repr(build(70, 50, 8))
        assert "in_features=70, out_features=50, bias=True, rank=8, quant_type=nf4, blocksize=64" in text

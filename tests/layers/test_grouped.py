"""Layers that are computed together give what each gives alone, against the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_checks import DTYPES, assert_within, build, draw, expect, grad, vectors
from tiny import decompose, make_checkpoint, perturbed, token_ids
from torch import Tensor

from qosora.config import OsoraConfig
from qosora.decompose import nf4
from qosora.layers import experts, grouped
from qosora.layers.grouped import grouped_product, members
from qosora.layers.linear import Member, QosoraLinear


def group(layers: list[QosoraLinear]) -> list[Member]:
    """The layers with trainable vectors."""
    return [Member(layer, *vectors(layer)) for layer in layers]


def check(layers: list[QosoraLinear], counts: list[int], dtype: torch.dtype, seed: int, autocast: bool = False) -> None:
    given_dtype = torch.float32 if autocast else dtype
    x = draw(sum(counts), layers[0].in_features, seed=seed, dtype=dtype).to(given_dtype).requires_grad_()
    g = draw(sum(counts), layers[0].out_features, seed=seed + 1, dtype=dtype)
    together = group(layers)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = grouped_product(x, counts, together)
    y.backward(g)
    assert (y.dtype, grad(x).dtype) == (dtype, given_dtype)
    each = zip(together, *(t.split(counts) for t in (x.detach(), g, y.detach(), grad(x))), strict=True)
    for member, inputs, gradients, output, dx in each:
        e = expect(member.layer, inputs, gradients, dtype)
        assert_within(output, e.y, e.y_tolerance, "y")
        assert_within(dx, e.dx, e.dx_tolerance, "dx")
        assert_within(grad(member.s), e.ds, e.ds_tolerance, "ds")
        assert_within(grad(member.o), e.do, e.do_tolerance, "do")


@given(
    dtype=st.sampled_from(DTYPES),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    n=st.sampled_from([7, 32, 64]),
    m=st.sampled_from([5, 64, 96]),
    rank=st.integers(1, 20),
    scale=st.sampled_from([None, "columns"]),
    quant_type=st.sampled_from(nf4.QUANT_TYPES),
    blocksize=st.sampled_from([32, 64]),
    double_quant=st.booleans(),
    at_once=st.integers(1, 2**16),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_output_and_gradients(
    dtype: torch.dtype, counts: list[int], n: int, m: int, rank: int, at_once: int, seed: int, **options: Any
):
    layers = [build(n, m, rank, bias=False, seed=seed + i, **options) for i in range(len(counts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "DECODED_BYTES", at_once)
        patch.setattr(grouped, "_SCALED_BYTES", at_once)
        check(layers, counts, dtype, seed)


def test_under_autocast(seed: int):
    layers = [build(64, 32, 8, bias=False, seed=i, scale="columns") for i in range(3)]
    check(layers, [2, 1, 4], torch.bfloat16, seed, autocast=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_torchs_grouped_product(dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch):
    """Which GPUs have: on a CPU it is there, too, and slow."""
    monkeypatch.setattr(grouped, "_has_grouped", lambda a, b: True)
    check([build(64, 32, 8, bias=False, seed=i, scale="columns") for i in range(4)], [3, 1, 8, 2], dtype, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, seed: int):
    layers = [build(128, 64, 16, bias=False, seed=i, scale="columns") for i in range(8)]
    x = draw(40, 128, seed=seed, dtype=dtype)
    outputs = []
    for device in ("cpu", "cuda"):
        x = x.detach().to(device).requires_grad_()
        together = group([layer.to(device) for layer in layers])
        y = grouped_product(x, [5] * 8, together)
        y.sum().backward()
        outputs.append([t.float().cpu() for t in (y.detach(), grad(x), *(grad(m.s) for m in together))])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(*outputs, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()


def test_without_a_graph_and_without_trained_vectors(seed: int):
    layers = [build(32, 64, 4, bias=False, seed=seed + i) for i in range(3)]
    x = draw(6, 32, seed=seed, dtype=torch.float32)
    frozen = [layer.member() for layer in layers]
    with torch.no_grad():
        expected = torch.cat([layer(rows) for layer, rows in zip(layers, x.split([1, 2, 3]), strict=True)])
        assert torch.allclose(grouped_product(x, [1, 2, 3], frozen), expected, atol=1e-5)
    x.requires_grad_()
    grouped_product(x, [1, 2, 3], frozen).sum().backward()
    alone = x.detach().clone().requires_grad_()
    torch.cat([layer(rows) for layer, rows in zip(layers, alone.split([1, 2, 3]), strict=True)]).sum().backward()
    assert torch.allclose(grad(x), grad(alone), atol=1e-5)


def test_what_is_not_alike_is_computed_alone():
    def one(**options: Any) -> QosoraLinear:
        return build(64, 32, **({"rank": 8, "bias": False} | options))

    assert members([one(), one(seed=1)]) is not None
    others = ({"rank": 7}, {"bias": True}, {"blocksize": 32}, {"scale": "columns"}, {"compute_dtype": torch.bfloat16})
    for options in others:
        assert members([one(), one(**options)]) is None, options
    assert members([one(), torch.nn.Linear(64, 32)]) is None
    assert members([one(bias=True)]) is None


@pytest.mark.parametrize("update_rank", [0, 2])
def test_a_mixture_with_an_adapter_with_another_and_with_none(
    tmp_path: Path, update_rank: int, monkeypatch: pytest.MonkeyPatch
):
    model = perturbed(decompose(make_checkpoint(tmp_path / "model", "qwen3_moe")), update_rank=update_rank)
    model.add_adapter("other", OsoraConfig())

    def computed() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(input_ids=token_ids(), labels=token_ids())
        if out.loss.requires_grad:
            out.loss.backward()
        return out.logits.detach(), {name: grad(p) for name, p in model.named_parameters() if p.grad is not None}

    for prepare in (lambda: None, lambda: model.set_adapter("other"), model.base_model.disable_adapter_layers):
        prepare()
        alone, gradients_alone = computed()
        with monkeypatch.context() as patch:
            patch.setattr(experts, "_together", lambda x: True)  # as on a GPU
            logits, gradients = computed()
        assert torch.allclose(logits, alone, atol=1e-5)
        assert gradients.keys() == gradients_alone.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, gradients_alone[name], rtol=1e-3, atol=1e-6), name

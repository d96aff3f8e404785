"""What a layer keeps while it generates on a CPU gives what it gives without, whatever changes meanwhile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from linear_checks import assert_within, build, draw, expect, vectors

from qosora.layers import kept
from qosora.layers.kept import KEPT_ROWS
from qosora.layers.linear import QosoraLinear


@pytest.fixture
def layer() -> QosoraLinear:
    return build(128, 96, 24, seed=0).eval()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, KEPT_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), [(128, 96), (90, 96), (128, 50)])
def test_the_reference_product(n: int, m: int, dtype: torch.dtype, rows: int):
    layer = build(n, m, 24, seed=1).eval()
    x = draw(rows, n, seed=2, dtype=dtype)
    wanted = expect(layer, x, draw(rows, m, seed=3, dtype=dtype), dtype)
    got = layer(x)
    assert layer._kept is not None
    # bitsandbytes rounds the residual's absmax to bfloat16 where it repacks: one rounding more than the others
    assert_within(got, wanted.y, 2 * wanted.y_tolerance, "y")


@torch.no_grad()
def test_what_an_optimizer_writes_is_seen(layer: QosoraLinear):
    """It writes to the same memory, and torch counts no version of that."""
    x = draw(2, 128, seed=1, dtype=torch.float32)
    s, o = vectors(layer)
    for vector in (s, o):
        layer.apply_vectors(x, s, o)
        vector.detach().numpy()[3] *= 1.5
        got = layer.apply_vectors(x, s, o)
        layer.train()
        assert torch.equal(got, layer.apply_vectors(x, s, o))
        layer.eval()


@torch.no_grad()
def test_made_once_and_only_to_generate(layer: QosoraLinear, monkeypatch: pytest.MonkeyPatch):
    layer(draw(KEPT_ROWS + 1, 128, seed=1, dtype=torch.float32))
    assert layer._kept is None
    one = draw(1, 128, seed=1, dtype=torch.float32)
    layer(one)
    first = layer._kept
    layer(one)
    assert layer._kept is first is not None
    layer(one.bfloat16())
    assert layer._kept is not first
    layer.train()
    assert layer._kept is None
    layer(one)
    assert layer._kept is None
    layer.eval()
    with torch.enable_grad():
        layer(one.requires_grad_())
    assert layer._kept is None
    monkeypatch.setattr(kept.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    layer(one)
    assert layer._kept is None


@torch.no_grad()
def test_it_is_no_part_of_the_layer(layer: QosoraLinear):
    names, count = list(layer.state_dict()), sum(1 for _ in layer.modules())
    layer(draw(1, 128, seed=1, dtype=torch.bfloat16))
    assert layer._kept is not None
    assert (list(layer.state_dict()), sum(1 for _ in layer.modules())) == (names, count)
    layer.to(torch.float16)
    assert layer._kept is None

"""What is relied on of PyTorch beside that names exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qosora.compat import torch as hidden


def test_a_storage_has_one_key_as_long_as_it_lives():
    for device in ("cpu", "meta"):
        a, b = torch.empty(6, device=device), torch.empty(6, device=device)
        assert hidden.storage_key(a) == hidden.storage_key(a.view(2, 3)) == hidden.storage_key(a[3:])
        assert hidden.storage_key(a) != hidden.storage_key(b)


def test_writing_in_place_counts_as_a_change():
    x = torch.zeros(2)
    before = hidden.changes(x)
    y = x + 1
    assert (hidden.changes(x), hidden.changes(y)) == (before, 0)
    x[0] = 1
    assert hidden.changes(x) > before


def test_a_modules_dicts_are_what_it_uses():
    layer = nn.BatchNorm1d(2)
    assert list(hidden.own_parameters(layer)) == ["weight", "bias"]
    hidden.own_parameters(layer)["weight"] = new = nn.Parameter(torch.ones(2))
    hidden.own_buffers(layer)["running_mean"] = mean = torch.ones(2)
    assert layer.weight is new
    assert layer.running_mean is mean
    assert hidden.own_parameters(nn.Linear(2, 2, bias=False))["bias"] is None


def test_lists_of_tensors_in_one_call():
    targets, sources = [torch.ones(2), torch.ones(3)], [torch.rand(2), torch.rand(3)]
    hidden.foreach_copy_(targets, sources)
    assert all(map(torch.equal, targets, sources))
    hidden.foreach_zero_(targets)
    assert not any(t.any() for t in targets)


def test_tree_iter_finds_tensors_in_whatever_a_model_returns():
    from transformers.modeling_outputs import CausalLMOutputWithPast

    x, y = torch.zeros(1), torch.ones(1)
    assert list(hidden.tree_iter({"a": [x, (y, None)]})) == [x, y, None]
    assert next(iter(hidden.tree_iter(CausalLMOutputWithPast(logits=x)))) is x


def test_the_limit_of_recompiles_is_only_raised():
    before = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=before):
        hidden.allow_recompiles(before + 5)
        assert torch._dynamo.config.recompile_limit == before + 5
        hidden.allow_recompiles(1)
        assert torch._dynamo.config.recompile_limit == before + 5


def test_a_dispatch_mode_sees_operators_of_backward_too():
    seen: list[str] = []

    class Mode(hidden.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(hidden.operator_name(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Mode():
        x.exp().sum().backward()
    assert seen[0] == "aten::exp"
    assert "aten::mul" in seen


def test_schemas():
    aten = torch.ops.aten
    assert hidden.is_pure(aten.add.Tensor)
    assert not hidden.is_pure(aten.add_.Tensor)
    assert not hidden.is_pure(aten.view.default)
    assert hidden.result_count(aten.add.Tensor) == 1
    assert hidden.result_count(aten.sort.default) == 2
    assert hidden.operator_name(hidden.index) == hidden.cuda_operators()[0]
    for name in hidden.cuda_operators()[1:]:
        assert hasattr(aten, name.removeprefix("aten::"))


def test_reading_a_value_is_one_operator():
    assert hidden.read_scalar(torch.tensor(3)) == 3


def test_attention_kernels_give_attention():
    q = k = v = torch.rand(1, 2, 8, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(hidden.cpu_flash_attention(q, k, v, 0.0, True, attn_mask=None, scale=None)[0], expected)
    for kernel, mask in ((hidden.flash_attention, ()), (hidden.efficient_attention, (None, True))):
        made = kernel(q.to("meta").half(), k.to("meta").half(), v.to("meta").half(), *mask, 0.0, True, scale=1.0)
        assert made[0].shape == q.shape

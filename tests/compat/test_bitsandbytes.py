"""What is relied on of bitsandbytes beside that names exist; `test_nf4` holds what its kernels compute."""

from __future__ import annotations

import logging

import bitsandbytes
import pytest
import torch
from torch import nn

from qosora.compat import bitsandbytes as hidden
from qosora.decompose import nf4

Optimizer8bit = bitsandbytes.optim.optimizer.Optimizer8bit


def test_kernels_are_those_of_the_functions():
    x = torch.randn(4, 64)
    packed, absmax = hidden.quantize_4bit(x, 64, "nf4", torch.uint8)
    expected, state = bitsandbytes.functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    assert torch.equal(packed.view(-1), expected.view(-1))
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(state.code, hidden.get_4bit_type("nf4", device=x.device))
    back = hidden.dequantize_4bit(packed, absmax, 64, "nf4", x.shape, torch.float32)
    assert torch.equal(back, bitsandbytes.functional.dequantize_4bit(expected, state))
    assert len(hidden.create_dynamic_map()) == 256


def test_the_product_has_the_name_under_which_it_is_seen():
    assert hidden.gemm_4bit.name() == hidden.GEMM_4BIT


@pytest.mark.parametrize(("numel", "paged"), [(hidden.PAGED_NUMEL - 1, False), (hidden.PAGED_NUMEL, True)])
def test_where_paging_begins(monkeypatch: pytest.MonkeyPatch, numel: int, paged: bool):
    made = []

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(torch.zeros(*shape, dtype=dtype))
        setattr(made[-1], "is_paged", True)  # noqa: B010, a tensor has no such attribute for a type checker
        return made[-1]

    monkeypatch.setattr(bitsandbytes.functional, "get_paged", get_paged)
    monkeypatch.setattr(bitsandbytes.functional, "fill", lambda tensor, value: None)
    p = nn.Parameter(torch.zeros(numel, device="meta"))  # no CPU: there it pages nothing
    optimizer = bitsandbytes.optim.AdamW([p], is_paged=True)
    optimizer.page_mng = (
        getattr(optimizer, "page_mng", None) or bitsandbytes.functional.GlobalPageManager.get_instance()
    )
    state = optimizer.get_state_buffer(p)
    assert hidden.is_paged(state) == paged == bool(made)


@pytest.mark.parametrize("kind", [bitsandbytes.optim.AdamW, bitsandbytes.optim.Lion])
@pytest.mark.parametrize(
    ("numel", "dtype"), [(hidden.SMALL_NUMEL - 1, torch.float32), (hidden.SMALL_NUMEL, torch.uint8)]
)
def test_states_are_made_as_by_a_step(kind: type, numel: int, dtype: torch.dtype):
    p = nn.Parameter(torch.zeros(numel))
    optimizer = kind([p], optim_bits=8, is_paged=False)
    hidden.allocate_states(optimizer)
    states = {key: value for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
    assert states["state1"].dtype == dtype
    assert not any(map(hidden.is_paged, states.values()))
    stepped = kind([q := nn.Parameter(torch.zeros(numel))], optim_bits=8, is_paged=False)
    q.grad = torch.ones(numel)
    stepped.step()
    assert {k: v.shape for k, v in stepped.state[q].items() if isinstance(v, torch.Tensor)} == {
        key: value.shape for key, value in states.items()
    }


def test_tensors_behind_a_parameter():
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    assert len(hidden.quant_tensors(layer.weight)) == 5
    assert all(isinstance(t, torch.Tensor) for t in hidden.quant_tensors(layer.weight))
    assert hidden.quant_tensors(nn.Parameter(torch.zeros(2))) == []


def test_a_filled_layer_runs_as_bitsandbytes_own():
    torch.manual_seed(0)
    plain = nn.Linear(128, 64)
    own = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4")
    own.load_state_dict(plain.state_dict())
    own = own.to("cpu").eval()
    q = nf4.quantize(plain.weight.detach())
    filled = bitsandbytes.nn.Linear4bit.__new__(bitsandbytes.nn.Linear4bit)
    nn.Module.__init__(filled)
    filled.in_features, filled.out_features, filled.bias = 128, 64, plain.bias
    hidden.fill_linear4bit(filled, q.tensors(), plain.weight.shape, torch.float32)
    assert set(vars(filled)) >= set(vars(own)) - {"_is_hf_initialized"}
    state = filled.weight.quant_state
    state.code, state.state2.code = own.weight.quant_state.code, own.weight.quant_state.state2.code
    x = torch.randn(3, 128, requires_grad=True)
    torch.testing.assert_close(filled(x), own(x), rtol=0, atol=2e-6)


def test_the_logger_is_the_one_that_speaks_on_import():
    import importlib

    assert importlib.import_module(hidden.CPU_LOGGER).logger is logging.getLogger(hidden.CPU_LOGGER)

"""Layers are told by what they compute, and left where their weight is used without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

from qosora.layers import linear_layers, read_directly


class Same(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Routed(nn.Linear):
    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(input), input


class Own(nn.Linear):
    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.gain = 3.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.gain * super().forward(input)


def test_layers_are_told_by_what_they_compute():
    model = nn.ModuleDict({
        "plain": nn.Linear(4, 3), "conv1d": Conv1D(3, 4), "same": Same(4, 3), "bare": Same(4, 3, bias=False),
        "scaled": Scaled(4, 3), "routed": Routed(4, 3), "own": Own(4), "other": nn.Embedding(4, 3),
    })  # fmt: skip
    assert list(linear_layers(model)) == ["plain", "conv1d", "same", "bare"]
    with torch.device("meta"):
        assert "same" in linear_layers(nn.ModuleDict({"same": Same(4, 3), "scaled": Scaled(4, 3)}))


class Mixer(nn.Module):
    inner: Any

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.called, self.cast, self.kept, self.placed = (nn.Linear(4, 4) for _ in range(5))
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.called.weight.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(F.linear(x, self.fused.weight))
        if x.dtype != self.kept.weight.dtype and self.kept.weight.dtype != torch.uint8:
            x = x.to(self.kept.weight.dtype)
        x = self.kept(x).to(self.placed.weight.device)
        return self.cast(x.to(self.cast.weight.dtype)) @ self.inner.deep.weight


class Derived(Mixer):
    pass


def test_layers_whose_weight_is_read_by_others():
    expected = ["fused", "cast", "inner.deep"]
    assert read_directly(Mixer()) == expected
    assert read_directly(nn.ModuleDict({"block": Derived()})) == [f"block.{name}" for name in expected]


def test_modules_of_torch_read_weights_too():
    model = nn.ModuleDict({"head": nn.MultiheadAttention(8, 2), "other": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3)})
    assert read_directly(model) == ["head.out_proj"]
    x = torch.randn(3, 1, 8)
    expected = model["head"](x, x, x)[0]
    model["head"].out_proj = nn.Identity()  # what stands for it must have its weight
    with pytest.raises(AttributeError):
        model["head"](x, x, x)
    assert expected.shape == x.shape


def test_models_of_transformers():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    falcon = FalconForCausalLM(FalconConfig(num_attention_heads=4, **sizes))
    assert len(linear_layers(falcon)) == 5
    assert read_directly(falcon) == []
    mamba = MambaForCausalLM(MambaConfig(state_size=4, **sizes))
    left = {name.rpartition(".")[2] for name in read_directly(mamba)}
    assert left == {"dt_proj", "x_proj", "out_proj", "lm_head"}

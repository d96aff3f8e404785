"""Modules of vectors for the packed optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES = (1, 7, 16, 255, 256, 257, 1000, 64, 513, 31)  # around the 256-element alignment


class Vectors(nn.Module):
    """Vectors beside a frozen weight, with a quadratic loss whose gradient differs in scale between vectors."""

    def __init__(self, sizes: tuple[int, ...] = SIZES, seed: int = 0, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vectors = nn.ParameterList(torch.randn(n, generator=generator).to(device) for n in sizes)
        self.frozen = nn.Parameter(torch.ones(3, device=device), requires_grad=False)
        self.targets = [torch.randn(n, generator=generator).to(device) for n in sizes]

    def forward(self, step: int = 0) -> Tensor:
        parts = zip(self.vectors, self.targets, strict=True)
        return sum(10.0 ** (i % 4 - 2) * (v - (step % 3 - 1) * t).square().sum() for i, (v, t) in enumerate(parts))

    def values(self) -> list[Tensor]:
        return [v.detach().clone() for v in self.vectors]


def train(model: Vectors, optimizer: Any, steps: range = range(10)) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()
        optimizer.step()
    return model.values()


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {i}: largest difference {(a - b).abs().max()}"


class Mixed(nn.Module):
    """Vectors, a small bf16 head, and an embedding large enough to be paged by itself."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.s, self.o = nn.Parameter(torch.randn(100)), nn.Parameter(torch.randn(300))
        self.head = nn.ModuleDict({"modules_to_save": nn.Linear(8, 6).bfloat16()})
        self.embedding = nn.Parameter(torch.randn(400, 256).t())  # 102,400 elements, not contiguous

    def forward(self) -> Tensor:
        head = self.head["modules_to_save"](torch.ones(2, 8, dtype=torch.bfloat16))
        return self.s.square().sum() + self.o.square().sum() + head.float().square().sum() + self.embedding.pow(2).sum()

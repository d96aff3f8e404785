"""GPU memory beside live tensors, and sizes of cards.

What was measured, was measured on one NVIDIA H200 with torch 2.11 (benchmarks/results/gpu/summary.json); the rest comes
from PyTorch's source and from experience with other models, and `ASSUMPTIONS` say which is which. `qosora profile`
measures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qosora.errors import ConfigError

__all__ = [
    "ASSUMPTIONS",
    "GPUS",
    "OF_EXPERTS",
    "OF_FP16",
    "OF_HOST",
    "OF_IMAGES",
    "OF_TEXT",
    "Card",
    "parse_bytes",
    "the_card",
]

MIB, GIB = 2**20, 2**30

#: What CUDA reports as the cards' total memory, GiB; rounded down.
GPUS = {
    "T4": 14.5, "RTX 3060": 11.7, "RTX 3080": 9.6, "RTX 3090": 23.6, "RTX 4060 Ti": 15.5, "RTX 4070": 11.6,
    "RTX 4080": 15.5, "RTX 4090": 23.5, "RTX 5080": 15.4, "RTX 5090": 31.3, "V100": 15.7, "L4": 22.0, "A10G": 22.0,
    "A6000": 47.4, "L40S": 44.3, "A100 40GB": 39.3, "A100 80GB": 79.1, "H100": 79.1, "H200": 139.7,
}  # fmt: skip
#: Dense products in 16 bits with sums in 32 bits, 10^12 operations a second, as the makers say.
TFLOPS = {
    "T4": 65, "RTX 3060": 26, "RTX 3080": 60, "RTX 3090": 71, "RTX 4060 Ti": 44, "RTX 4070": 58, "RTX 4080": 97,
    "RTX 4090": 165, "RTX 5080": 113, "RTX 5090": 210, "V100": 112, "L4": 121, "A10G": 70, "A6000": 155, "L40S": 362,
    "A100 40GB": 312, "A100 80GB": 312, "H100": 989, "H200": 989,
}  # fmt: skip
ATTAINED = 0.5  # of these; not measured
LINK = 25.0  # GB/s from host memory, of 32 that PCIe 4.0 x16 has; not measured
_DATA_CENTRE = ("H100", "H200", "B200")
_HOPPER = (*_DATA_CENTRE, "RTX 50")  # and Blackwell

_SMALL_WORKSPACE = 8 * MIB + 128 * 1024  # cuBLAS, :4096:2:16:8
_LARGE_WORKSPACE = 32 * MIB  # Hopper and Blackwell; H200: as measured
_HANDLES = 2  # the thread that runs forward, and autograd's
OVERHEAD = 0.12  # reserved over allocated; H200: 2.7 % to 20 %
_CONTEXT = 450 * MIB  # not measured
_LARGE_CONTEXT = 900 * MIB  # H200: 767 to 897 MiB in a fresh process, more where several models were loaded in turn

ASSUMPTIONS = (
    "kernels' shapes come from tracing on the meta device; on one card, an H200, steps of Llama-2-7B and Llama-3.1-8B "
    "allocated 1.00 to 1.01 times as much as planned",
    f"a cuBLAS workspace for each of {_HANDLES} threads: 32 MiB on Hopper and Blackwell (H200: measured), 8.1 MiB on "
    "other cards (not measured)",
    f"the caching allocator reserves {OVERHEAD:.0%} more than it hands out (H200: 3% to 20%); expandable segments need "
    "less",
    f"the CUDA context, outside of what PyTorch counts, takes {_LARGE_CONTEXT / MIB:.0f} MiB on "
    f"{', '.join(_DATA_CENTRE)} (H200: 767 to 897 MiB measured) and {_CONTEXT / MIB:.0f} MiB on other cards (not "
    "measured)",
    "flash attention where there is no mask (H200: PyTorch took cuDNN's instead), memory-efficient "
    "attention where there is one",
    "every token is trained on; fewer supervised tokens make the loss cheaper",
)
OF_HOST = (
    "a base that comes to the GPU layer by layer has 3 layers there at once from host memory and 4 from other GPUs: "
    "the one that computes, the next, and buffers; as FSDP2 does it by its source, not measured on a GPU",
    f"from host memory come {LINK:g} GB/s (PCIe 4.0 x16), and products run at {ATTAINED:.0%} of the card's peak, if "
    "nothing else is said; neither is measured",
)
OF_FP16 = (
    "fp16 trains under autocast, its loss scaled: the bytes of bf16, but for results that autocast leaves in float32, "
    "those of LayerNorm (not of RMSNorm) and the sums over a token's experts",
)
OF_TEXT = ("a text without images: what these and the tower of vision take comes to it, as --images counts it",)
OF_IMAGES = (
    "all images have the size that was given, or are those of the longest examples; what cuDNN's convolutions take for "
    "patches is not counted, and no step with images was measured on a GPU",
)
OF_EXPERTS = (
    "of each layer's experts one gets every token and the others share the rest: no choice of experts takes more",
    "no QLoRA beside it: bitsandbytes leaves stacked experts in 16 bits",
)


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: As given.
        memory_bytes: In all; None if unknown.
    """

    name: str
    memory_bytes: int | None

    @property
    def tflops(self) -> float | None:
        """What its products attain, 10^12 operations a second; None where the card is unknown."""
        known = max((name for name in TFLOPS if name in self.name), key=len, default=None)  # L40S is no L4
        return None if known is None else ATTAINED * TFLOPS[known]

    @property
    def workspace_bytes(self) -> int:
        """Bytes of cuBLAS' workspaces."""
        return _HANDLES * (_LARGE_WORKSPACE if self._is_one_of(_HOPPER) else _SMALL_WORKSPACE)

    @property
    def context_bytes(self) -> int:
        """Bytes of the CUDA context of a process."""
        return _LARGE_CONTEXT if self._is_one_of(_DATA_CENTRE) else _CONTEXT

    def _is_one_of(self, names: Sequence[str]) -> bool:
        return any(name in self.name for name in names)


def the_card(gpu: str | None = None, memory: str | int | None = None) -> Card:
    """Return the card that is planned for: by name, by its memory, or the one that is here.

    Raises:
        ConfigError: An unknown name, or no memory size.
    """
    size = parse_bytes(memory) if isinstance(memory, str) else memory
    if gpu is not None:
        known = _find(gpu)
        return Card(known, int(GPUS[known] * GIB) if size is None else size)
    if size is not None:
        return Card(f"{size / GIB:g} GiB", size)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Card(str(found.name), int(found.total_memory))
    return Card("any", None)


def _find(gpu: str) -> str:
    def plain(name: str) -> str:
        return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())

    matches = [name for name in GPUS if plain(gpu) in plain(name)] if plain(gpu) else []
    exact = [name for name in matches if plain(name) == plain(gpu)]
    if len(exact or matches) != 1:
        raise ConfigError(
            f"gpu must be one of {', '.join(GPUS)}; got {gpu!r}. For another card give its memory instead: 24GiB"
        )
    return (exact or matches)[0]


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as "24GiB", "24 GB" or "8192MiB".

    Raises:
        ConfigError: It is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ConfigError(f"a memory size is a number above zero with a unit, such as 24GiB or 8192MiB; got {text!r}")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)

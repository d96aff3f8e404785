"""GPU memory beside live tensors, and sizes of cards.

None of these constants has been measured on a GPU for this package yet: they come from PyTorch's source and from
experience with other models. `qosora profile` measures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qosora.errors import ConfigError

__all__ = ["ASSUMPTIONS", "GPUS", "OF_EXPERTS", "OF_FP16", "Card", "parse_bytes", "the_card"]

MIB, GIB = 2**20, 2**30

#: What CUDA reports as the cards' total memory, GiB; rounded down.
GPUS = {
    "T4": 14.5, "RTX 3060": 11.7, "RTX 3080": 9.6, "RTX 3090": 23.6, "RTX 4060 Ti": 15.5, "RTX 4070": 11.6,
    "RTX 4080": 15.5, "RTX 4090": 23.5, "RTX 5080": 15.4, "RTX 5090": 31.3, "V100": 15.7, "L4": 22.0, "A10G": 22.0,
    "A6000": 47.4, "L40S": 44.3, "A100 40GB": 39.3, "A100 80GB": 79.1, "H100": 79.1, "H200": 139.7,
}  # fmt: skip
_HOPPER = ("H100", "H200", "RTX 50", "B200")

_SMALL_WORKSPACE = 8 * MIB + 128 * 1024  # cuBLAS, :4096:2:16:8
_LARGE_WORKSPACE = 32 * MIB  # Hopper and Blackwell
_HANDLES = 2  # the thread that runs forward, and autograd's
OVERHEAD = 0.12  # reserved over allocated
CONTEXT = 450 * MIB

ASSUMPTIONS = (
    "not measured on a GPU: kernels' shapes come from tracing on the meta device, the rest are constants",
    f"a cuBLAS workspace for each of {_HANDLES} threads: 8.1 MiB, 32 MiB on Hopper and Blackwell",
    f"the caching allocator reserves {OVERHEAD:.0%} more than it hands out; expandable segments need less",
    f"the CUDA context takes {CONTEXT / MIB:.0f} MiB, outside of what PyTorch counts",
    "flash attention where there is no mask, memory-efficient attention where there is one",
    "every token is trained on; fewer supervised tokens make the loss cheaper",
)
OF_FP16 = (
    "fp16 trains under autocast, its loss scaled: the bytes of bf16, but for results that autocast leaves in float32, "
    "those of LayerNorm (not of RMSNorm) and the sums over a token's experts",
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
    def workspace_bytes(self) -> int:
        """Bytes of cuBLAS' workspaces."""
        return _HANDLES * (_LARGE_WORKSPACE if any(part in self.name for part in _HOPPER) else _SMALL_WORKSPACE)


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

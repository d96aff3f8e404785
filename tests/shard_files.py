"""Tensors to write in shards, and their writing."""

from __future__ import annotations

from pathlib import Path

import torch

from qosora.checkpoints.shards import Shards, StoredSpec

INDEX = "model.safetensors.index.json"
TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.packed": torch.arange(7, dtype=torch.uint8),
    "a.offset": torch.tensor(2.5),
    "c.half": torch.ones(2, 2, dtype=torch.bfloat16),
    "c.empty": torch.zeros(0, 3, dtype=torch.float16),
}


def write_shards(folder: Path, max_shard_bytes: int, tensors: dict[str, torch.Tensor] = TENSORS) -> Shards:
    folder.mkdir(exist_ok=True)
    shards = Shards(folder, {name: StoredSpec.of(tensor) for name, tensor in tensors.items()}, max_shard_bytes)
    shards.allocate()
    for name, tensor in reversed(tensors.items()):  # the order does not matter
        shards.write(name, tensor)
    shards.seal()
    return shards

"""The forms that tensors are stored in: by themselves, as all of `nf4` takes seconds to import."""

from __future__ import annotations

__all__ = ["BLOCKSIZES", "EMBEDDINGS", "QUANT_TYPES"]

#: Of embeddings and output layer, where they are not left in 16 bits; the smallest last.
EMBEDDINGS = ("8bit", "4bit")
QUANT_TYPES = ("nf4", "fp4")
#: bitsandbytes also knows 2048 and 4096, where its CPU kernels lose accuracy and fall back to compiled code.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024)

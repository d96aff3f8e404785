"""Dtypes by name: torch's own, as config.json has them, and the short ones of a training run's precision."""

from __future__ import annotations

import torch

from qosora.errors import ConfigError

__all__ = ["COMPUTE_DTYPES", "PRECISIONS", "dtype_name", "dtype_named"]

#: What weights and products may be in.
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """Return a dtype.

    Args:
        name: "bfloat16" or "torch.bfloat16", "bf16", or the dtype itself.

    Raises:
        ConfigError: There is no such dtype.
    """
    found = PRECISIONS.get(str(name)) or getattr(torch, dtype_name(name), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"there is no dtype {name!r}; name one of torch's, such as {', '.join(COMPUTE_DTYPES)}")
    return found


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return torch's name of a dtype without its module, as config.json has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")

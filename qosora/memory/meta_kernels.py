"""Make the meta device compute as another: which kernel attention takes, what runs in fused kernels, what needs values.

On the meta device an operation gives a tensor's shape and allocates what its meta kernel says. Where PyTorch, TRL or we
choose by the device, the choice for "meta" would be another than for the device that is planned for: attention would
fall back to the kernel that builds the whole matrix of scores. `computing_as` replaces these choices while it is on;
a TorchFunctionMode could not, being off inside `backward()`, where checkpointing runs the layers again.

`CUDA_WORKSPACES` is what CUDA kernels allocate inside, from reading their source (PyTorch 2.13, bitsandbytes 0.50).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F

from qosora.compat.bitsandbytes import GEMM_4BIT
from qosora.compat.torch import (
    cpu_flash_attention,
    cuda_operators,
    efficient_attention,
    flash_attention,
    index,
    is_pure,
    operator_name,
    read_scalar,
    result_count,
    storage_key,
    to_copy,
    tree_iter,
    tree_map,
)
from qosora.compat.trl import fused_loss_on_meta
from qosora.layers import planning_for
from qosora.memory.tracer import Workspace

__all__ = ["CPU_WORKSPACES", "CUDA_WORKSPACES", "MetaKernels", "computing_as"]

_math_attention = F.scaled_dot_product_attention
_is_autocast_enabled = torch.is_autocast_enabled


@contextmanager
def computing_as(device: str) -> Iterator[None]:
    """Let meta tensors take the ways that tensors on "cuda" or "cpu" take."""
    cuda = device == "cuda"
    with (
        patch.object(torch, "is_autocast_enabled", lambda device=None: device != "meta" and _autocast(device)),
        patch.object(F, "scaled_dot_product_attention", _cuda_attention if cuda else _cpu_attention),
        fused_loss_on_meta() if cuda else nullcontext(),
        planning_for(device),
    ):
        yield


def _autocast(device: str | None) -> bool:
    return _is_autocast_enabled() if device is None else _is_autocast_enabled(device)


def _cuda_attention(
    query: torch.Tensor,  # (batch, heads, tokens, head_dim)
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Flash attention for 16 bits and no mask; else memory-efficient attention; else the matrix of scores."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if attn_mask is None and half and query.shape[-1] == value.shape[-1] <= 256:
        width = query.shape[-1]
        if width % 8:  # the kernel wants heads of whole 16 bytes
            query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
        out: torch.Tensor = flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width]
    if enable_gqa:  # which the memory-efficient kernel does not have
        return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, query.dtype)
        if short := -attn_mask.shape[-1] % (8 if half else 4):
            attn_mask = F.pad(attn_mask, (0, short))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    result: torch.Tensor = efficient_attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    return result


def _cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The CPU's flash attention, which takes masks and groups of heads, but no dropout."""
    if dropout_p or query.shape[-1] != value.shape[-1]:
        return _math_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, query.dtype)
    out: torch.Tensor = cpu_flash_attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[
        0
    ]
    return out


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of scores to add, as ATen makes it of a boolean one."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -math.inf)


class MetaKernels:
    """Runs operations on meta tensors, each once for the same kinds of arguments: their kernels are slow Python.

    Args:
        answer: What tensors say that are asked for a value: whether a mask can be left out.
        valued: Whether the batch has values, as one with images, of whose places there must be as many as images have.
    """

    def __init__(self, answer: bool, *, valued: bool = False) -> None:
        self.answer, self.valued = answer, valued
        self._operators: dict[int, _Operator] = {}  # by identity: torch keeps them, and they hash slowly

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; without values where it needs them."""
        if (operator := self._operators.get(id(func))) is None:
            operator = self._operators[id(func)] = _Operator(func)
        if self.valued:
            if _is_mixed(args, kwargs):  # the model has no values
                if func is index and _is_mask(args[1], meta=False):
                    mask = args[1][0]
                    return args[0].new_empty((int(mask.sum()), *args[0].shape[mask.ndim :]))
                if operator.in_place and not args[0].is_meta:
                    return args[0]
                args, kwargs = tree_map(_on_meta, (args, kwargs))
            elif func is to_copy and "device" in kwargs:  # what has values keeps them, and nothing gets any
                kwargs = {**kwargs, "device": args[0].device}
        if not operator.pure:
            in_place = operator.in_place and isinstance(args[0], torch.Tensor) and args[0].is_meta
            return args[0] if in_place else func(*args, **kwargs)
        if func is read_scalar and args[0].is_meta:
            return self.answer
        if func is index and _is_mask(args[1]):  # as if the mask were true everywhere
            mask = args[1][0]
            return args[0].new_empty((mask.numel(), *args[0].shape[mask.ndim :]))
        inputs: list[torch.Tensor] = []
        key = (_described(args, inputs), _described(kwargs.items(), inputs))
        for tensor in inputs:
            if not tensor.is_meta:  # what has values: the choice of experts
                return func(*args, **kwargs)
        if key not in operator.results:
            out = func(*args, **kwargs)
            operator.results[key] = _results(out, inputs)
            return out
        results = operator.results[key]
        if results is None:
            return func(*args, **kwargs)
        made = [r.tensor() if isinstance(r, _Made) else r for r in results]
        return made[0] if operator.single else tuple(made)


class _Operator:
    """What is known of an operator.

    Attributes:
        pure: Whether it returns new memory, changing none.
        in_place: Whether it changes and returns its first argument.
        single: Whether it has one result.
        results: By arguments.
    """

    __slots__ = ("in_place", "pure", "results", "single")

    def __init__(self, func: Any) -> None:
        self.pure = is_pure(func)
        self.in_place = not self.pure and operator_name(func).endswith("_")
        self.single = result_count(func) == 1
        self.results: dict[Any, list[_Result] | None] = {}


class _Made(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


_Result = _Made | int | float | None


def _is_mask(indices: Any, *, meta: bool = True) -> bool:
    mask = indices[0] if indices else None
    return mask is not None and mask.is_meta == meta and mask.dtype == torch.bool


def _is_mixed(args: Any, kwargs: Any) -> bool:
    """Say whether some arguments are on the meta device and some are not."""
    return len({tensor.is_meta for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}) == 2


def _on_meta(item: Any) -> Any:
    return item.to("meta") if isinstance(item, torch.Tensor) else item


def _described(values: Iterable[Any], inputs: list[torch.Tensor]) -> tuple[Any, ...]:
    """Arguments as a key, with tensors by what decides about a result's shape; collects the tensors."""
    key: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            inputs.append(value)
            key.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            key.append(_described(value, inputs))
        else:
            key.append((type(value), value))
    return tuple(key)


def _results(out: Any, inputs: list[torch.Tensor]) -> list[_Result] | None:
    """What to make again of a result; None where it is no new memory on the meta device."""
    shared = {storage_key(tensor) for tensor in inputs}
    found: list[_Result] = []
    for item in out if isinstance(out, tuple) else (out,):
        if isinstance(item, torch.Tensor):
            if not item.is_meta or storage_key(item) in shared:
                return None
            found.append(_Made(item.shape, item.stride(), item.dtype))
        elif item is None or isinstance(item, (int, float)):
            found.append(item)
        else:
            return None
    return found


# ---- memory inside operations --------------------------------------------------------------------------------------


def _flash_backward(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """DQ in float32, row sums, and under grouped heads dK and dV of every head (flash_api.cpp, mha_bwd)."""
    batch, heads, tokens, width = query.shape
    rows = -(-tokens // 128) * 128
    columns = -(-width // 32) * 32 if width <= 192 else 256
    accumulators = batch * heads * rows * (columns + 1) * 4
    expanded = 2 * batch * heads * key.shape[2] * width * query.element_size() if key.shape[1] != heads else 0
    return accumulators + expanded


def _efficient_backward(grad: torch.Tensor, query: torch.Tensor, *_: Any, **__: Any) -> int:
    """Row sums, and in 16 bits dQ in float32 (mem_eff_attention, kNeedsAccumGradQ)."""
    return query.numel() // query.shape[-1] * 4 + (query.numel() * 4 if query.element_size() == 2 else 0)


def _gemm_4bit(
    x: torch.Tensor, packed: torch.Tensor, shape: Any, absmax: Any, blocksize: int, *_: Any, **__: Any
) -> int:
    """The dequantized weight and its float32 absmax: for many rows bitsandbytes dequantizes and calls cuBLAS."""
    numel = math.prod(shape)
    return numel * x.element_size() + -(-numel // blocksize) * 4


def _index(x: torch.Tensor, indices: Any, *_: Any, **__: Any) -> int:
    """The positions that a mask selects, which nonzero() finds first."""
    return indices[0].numel() * indices[0].ndim * 8 if _is_mask(indices) else 0


CPU_WORKSPACES: Mapping[str, Workspace] = {GEMM_4BIT: _gemm_4bit}
CUDA_WORKSPACES: Mapping[str, Workspace] = {
    **CPU_WORKSPACES,
    **dict(zip(cuda_operators(), (_index, _flash_backward, _efficient_backward), strict=True)),
}

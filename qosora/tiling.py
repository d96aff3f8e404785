"""MLPs and norms computed in tiles along the sequence, once more in backward, so that one tile's intermediates live.

With gradient checkpointing, the most memory is in use during one layer's backward: six tensors of tokens ×
intermediate_size in the MLP, and float32 copies of tokens × hidden_size in the norms. Both act on each position by
itself: y[t] depends on x[t] alone. So x is all that is saved, and backward goes through the tiles one at a time:
compute again, differentiate, add up the parameters' gradients. The idea is TiledMLP's (Arctic long sequence training,
arXiv 2506.13996); here a norm is a case of it, and three things are done differently:

- x is saved *before* anything is computed. Where the layer itself is computed again (non-reentrant checkpointing, which
  stops as soon as all saved tensors are there), an MLP at the layer's end is then not computed a third time.
- A sequence of one tile runs an MLP as it is. So short sequences pay nothing.
- Tiles are long: a tile dequantizes all of the MLP's weights, which is little against products with 4096 rows.

What is such a module is read off its structure: see `_is_mlp` and `_is_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from qosora.errors import ConfigError

__all__ = ["TILE_LENGTH", "apply_tiling"]

#: Tokens of a tile. Dequantizing a weight costs as much as its product with some 200 rows, on CPUs and GPUs alike.
TILE_LENGTH = 4096


def apply_tiling(model: nn.Module, tile_length: int | None = None, *, mlps: bool = True) -> list[str]:
    """Let a model's MLPs and norms compute in tiles, in place; gradients stay the same but for the order of sums.

    Works with and without an adapter and gradient checkpointing, on the meta device, too. May be called again.

    Args:
        model: A transformers model or PEFT's wrapper of one.
        tile_length: Tokens of a tile, over all sequences of a batch; `TILE_LENGTH` by default, 0 undoes tiling.
        mlps: Whether to tile MLPs. Without gradient checkpointing this computes them a second time; norms cost little.

    Returns:
        The names of the modules that are tiled now.

    Raises:
        ConfigError: `tile_length` is negative.

    Example:
        >>> model = get_peft_model(model, OsoraConfig())  # doctest: +SKIP
        >>> apply_tiling(model, 2048)  # doctest: +SKIP
    """
    length = TILE_LENGTH if tile_length is None else tile_length
    if length < 0:
        raise ConfigError(f"tile_length must be at least 0, got {length}")
    hidden_size: int = model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
    tiled = []
    for name, module in model.named_modules():
        if isinstance(tiling := vars(module).get("forward"), _Tiled):
            del module.forward
            if tiling.forward != module.forward:  # as where Liger had put its own
                module.forward = tiling.forward
        is_mlp = _is_mlp(module)
        if length and ((is_mlp and mlps) or _is_norm(module)):
            module.forward = _Tiled(module, module.forward, length * hidden_size, is_mlp)
            tiled.append(name)
    return tiled


def _is_mlp(module: nn.Module) -> bool:
    """Say whether a module is n → m, an activation, maybe a gate, m → n: two or three linear layers and no mixing.

    Attention has four linear layers, or a fused one of another width, and no activation; a mixture of experts has a
    router; state space models have parameters of their own.
    """
    shapes, activations = [], 0
    for child in module.children():
        if (shape := _linear_shape(child)) is not None:
            shapes.append(shape)
        elif type(child).__module__.startswith(("torch.nn.modules.activation", "transformers.activations")):
            activations += 1
        elif any(True for _ in child.parameters()):
            return False
    if len(shapes) not in (2, 3) or not activations or any(True for _ in module.parameters(recurse=False)):
        return False
    n = shapes[0][0]
    return any(
        out == n and all(shape in ((n, m), (n, 2 * m)) for shape in [*shapes[:i], *shapes[i + 1 :]])
        for i, (m, out) in enumerate(shapes)
    )


def _linear_shape(module: Any) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer of whatever kind: plain, decomposed, adapted; GPT-2's `Conv1D`."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None


def _is_norm(module: nn.Module) -> bool:
    """Say whether a module is an RMSNorm over the last dimension, in Python: these copy their input to float32.

    Fused ones, Liger's and `nn.LayerNorm`, save no more than their input already.
    """
    shapes = [p.ndim for p in module.parameters()]
    return "RMSNorm" in type(module).__name__ and shapes in ([], [1]) and "forward" not in vars(module)


class _Tiled:
    """A module's forward, in tiles; takes the place of `module.forward`.

    Args:
        module: Computes each position by itself.
        forward: Its own.
        numel: Elements of the input in a tile.
        is_mlp: Whether a single tile runs untouched, and there may be dropout.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], numel: int, is_mlp: bool) -> None:
        self.module, self.forward, self.numel, self.is_mlp = module, forward, numel, is_mlp

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, torch.Tensor) or x.ndim < 2:
            return self.forward(*args, **kwargs)  # such as BLOOM's MLP, which adds the residual
        dim = x.ndim > 2  # the sequence; a tile takes a part of each
        count = min(-(-x.numel() // self.numel), x.shape[dim])
        if count <= 1 and self.is_mlp:
            return self.forward(x)
        params = [p for p in self.module.parameters() if p.requires_grad]
        call = _Call(self.forward, max(count, 1), int(dim))
        if not (torch.is_grad_enabled() and (x.requires_grad or params)):
            return call.value(x)
        call.remember(x, random=self.is_mlp and self.module.training)
        return _Value.apply(_Saved.apply(call, x, *params), call, x.detach())  # type: ignore[no-untyped-call]


class _Call:
    """One call of a tiled module: how to compute it, in what state, and the gradient on its way to `_Saved`."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], count: int, dim: int) -> None:
        self.forward, self.count, self.dim = forward, count, dim
        self.gradient: torch.Tensor | None = None
        self._contexts: list[Callable[[], AbstractContextManager[Any]]] = []

    def tiles(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.chunk(self.count, self.dim)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output, filled tile by tile: joining tiles in the end would hold it twice."""
        y: torch.Tensor | None = None
        start = 0
        for tile in self.tiles(x):
            part = self.forward(tile)
            if y is None:
                y = part.new_empty(x.shape)
            y.narrow(self.dim, start, tile.shape[self.dim]).copy_(part)
            start += tile.shape[self.dim]
        assert y is not None
        return y

    def remember(self, x: torch.Tensor, *, random: bool) -> None:
        """Note what backward must restore to compute the same again: autocast, and the state of random numbers."""
        kind = x.device.type
        if torch.amp.is_autocast_available(kind):
            dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            self._contexts.append(lambda: torch.autocast(kind, dtype, enabled, cache_enabled=False))
        if random:
            self._contexts.append(_random_state(x))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore that state. Hooks on saved tensors, which offload activations, are for the forward pass alone."""
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context())
            stack.enter_context(saved_tensors_hooks(_as_it_is, _as_it_is))
            yield


class _Saved(torch.autograd.Function):
    """Saves x before it is computed with, and computes the gradients. Returns an empty handle for `_Value`."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: torch.Tensor, *params: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.call, ctx.params = call, params
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        (x,), g = ctx.saved_tensors, call.gradient
        assert g is not None
        call.gradient = None
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        sums: list[torch.Tensor | None] = [None] * len(ctx.params)
        parts = call.tiles(x if dx is None else dx)
        with call.again():
            for tile, g_tile, part in zip(call.tiles(x), call.tiles(g), parts, strict=True):
                tile = tile.detach().requires_grad_(dx is not None)
                with torch.enable_grad():
                    y = call.forward(tile)
                wanted = [*ctx.params] if dx is None else [*ctx.params, tile]
                grads = list(torch.autograd.grad(y, wanted, g_tile, allow_unused=True))
                if dx is not None:
                    part.copy_(grads.pop())
                sums = [_sum(total, grad) for total, grad in zip(sums, grads, strict=True)]
        return None, dx, *sums


class _Value(torch.autograd.Function):
    """The output. Its gradient goes to `_Saved` past autograd, which wants gradients in the shape of the handle."""

    @staticmethod
    def forward(ctx: Any, handle: torch.Tensor, call: _Call, x: torch.Tensor) -> torch.Tensor:
        ctx.call = call
        return call.value(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.call.gradient = g
        return g.new_empty(0), None, None


def _sum(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    return total if grad is None else grad if total is None else total.add_(grad)


def _random_state(x: torch.Tensor) -> Callable[[], AbstractContextManager[None]]:
    """Return what brings the present state of random numbers back, on the CPU and on x's device, for a while."""
    state = torch.get_rng_state()
    devices, states = get_device_states(x)

    @contextmanager
    def context() -> Iterator[None]:
        with torch.random.fork_rng(devices, device_type=x_type):
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=x_type)
            yield

    x_type = x.device.type
    return context


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

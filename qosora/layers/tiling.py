"""MLPs and norms computed in tiles along the sequence, once more in backward, so that one tile's intermediates live.

With gradient checkpointing, the most memory is in use during one layer's backward: six tensors of tokens ×
intermediate_size in the MLP, and float32 copies of tokens × hidden_size in the norms. Both act on each position by
itself: y[t] depends on x[t] alone. So x is all that is saved, and backward goes through the tiles one at a time:
compute again, differentiate, add up the parameters' gradients. The idea is TiledMLP's (Arctic long sequence training,
arXiv 2506.13996); here a norm is a case of it, and three things are done differently:

- x is saved *before* anything is computed. Where the layer itself is computed again (non-reentrant checkpointing, which
  stops as soon as all saved tensors are there), an MLP at the layer's end is then not computed a third time; nor is one
  whose output goes through a norm (Gemma, OLMo 2), as that is computed again from the MLP's input, too.
- A sequence of one tile runs an MLP as it is. So short sequences pay nothing.
- Tiles are long: a tile dequantizes all of the MLP's weights, which is little beside products with 4096 rows.

What is such a module is read off its structure: see `_output_projection` and `_is_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from qosora.compat.torch import changes
from qosora.errors import ConfigError
from qosora.layers.device import pieces

__all__ = ["TILE_LENGTH", "Tiling", "apply_tiling"]

#: Tokens of a tile. Of 2048 tokens on a CPU, tiles of 256, 512 and 1024 made a step 15, 8 and 1 % longer; a GPU, whose
#: products are faster in relation to its memory, wants longer ones.
TILE_LENGTH = 4096


@dataclass(frozen=True)
class Tiling:
    """What of a model computes in tiles; `Tiling.of` makes one of what a user says.

    Attributes:
        length: Tokens of a tile, over all sequences of a batch; with 0 nothing does.
        mlps: Whether MLPs do, too, and not norms alone.
    """

    length: int
    mlps: bool

    @classmethod
    def of(cls, tile_length: int | None = None, *, gradient_checkpointing: bool = True) -> Tiling:
        """Return what `tile_length` means.

        Args:
            tile_length: Tokens of a tile; by default `TILE_LENGTH`, and MLPs only where that costs nothing: without
                checkpointing they would be computed a second time. Norms cost little.
            gradient_checkpointing: Whether layers are computed again in backward.

        Raises:
            ConfigError: `tile_length` is negative.
        """
        if tile_length is None:
            return cls(TILE_LENGTH, mlps=gradient_checkpointing)
        if tile_length < 0:
            raise ConfigError(f"tile_length must be at least 0, got {tile_length}")
        return cls(tile_length, mlps=True)


def apply_tiling(model: nn.Module, tile_length: int | None = None, *, mlps: bool = True) -> list[str]:
    """Let a model's MLPs and norms compute in tiles, in place; gradients stay the same but for the order of sums.

    Works with and without an adapter and gradient checkpointing, on the meta device, too. May be called again.

    Args:
        model: A transformers model or PEFT's wrapper of one.
        tile_length: Tokens of a tile, over all sequences of a batch; `TILE_LENGTH` by default, 0 undoes tiling.
        mlps: Whether to tile MLPs, too, and not norms alone.

    Returns:
        The names of the modules that are tiled now.

    Raises:
        ConfigError: `tile_length` is negative.

    Example:
        >>> model = get_peft_model(model, OsoraConfig())  # doctest: +SKIP
        >>> apply_tiling(model, 2048)  # doctest: +SKIP
    """
    from qosora.layers.linear import QosoraLinear  # which takes seconds, and a planner wants `Tiling` alone

    length = Tiling.of(tile_length).length
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    hidden_size: int = getattr(config, "hidden_size", 0)
    length *= bool(hidden_size)  # BLT's parts have sizes of their own
    tiled = []
    for name, module in model.named_modules():
        if isinstance(tiling := vars(module).get("forward"), _Tiled):
            del module.forward
            if tiling.forward != module.forward:  # as where Liger had put its own
                module.forward = tiling.forward
        down = _output_projection(module)
        is_mlp = down is not None
        if isinstance(last := getattr(down, "base_layer", down), QosoraLinear):
            last.saves_first = mlps  # where a tile is all there is; MLPs are tiled where layers are checkpointed
        if length and ((is_mlp and mlps) or _is_norm(module)):
            module.forward = _Tiled(module, module.forward, length * hidden_size, is_mlp)
            tiled.append(name)
    return tiled


def _output_projection(module: nn.Module) -> nn.Module | None:
    """Return the last linear layer of an MLP: n → m, an activation, maybe a gate, m → n, and no mixing; None of others.

    Attention has four linear layers, or a fused one of another width, and no activation; a mixture of experts has a
    router; state space models have parameters of their own.
    """
    linears, shapes, activations = [], [], 0
    for child in module.children():
        if (shape := _linear_shape(child)) is not None:
            linears.append(child)
            shapes.append(shape)
        elif type(child).__module__.startswith(("torch.nn.modules.activation", "transformers.activations")):
            activations += 1
        elif any(True for _ in child.parameters()):
            return None
    if len(shapes) not in (2, 3) or not activations or any(True for _ in module.parameters(recurse=False)):
        return None
    n = shapes[0][0]
    for i, (m, out) in enumerate(shapes):
        if out == n and all(shape in ((n, m), (n, 2 * m)) for shape in [*shapes[:i], *shapes[i + 1 :]]):
            return linears[i]
    return None


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
        tiles = _Tiles(x, self.numel)
        if tiles.count == 1 and self.is_mlp:
            return self.forward(x)
        params = [p for p in self.module.parameters() if p.requires_grad]
        if not (torch.is_grad_enabled() and (x.requires_grad or params)):
            return tiles.map(self.forward, x)
        source: _Source | None = getattr(x, "_tiled_source", None)
        if source is not None and changes(x) == source.version and not params:
            # A norm of an MLP's output (Gemma, OLMo 2): computed again from the MLP's input, it need not save its own
            y: torch.Tensor = _Value.apply(source.handle, source.call, self.forward, x.detach())  # type: ignore[no-untyped-call]
            return y
        call = _Call(self.forward, tiles, x, random=self.is_mlp and self.module.training)
        handle = _Saved.apply(call, x, *params)  # type: ignore[no-untyped-call]
        y = _Value.apply(handle, call, None, x.detach())  # type: ignore[no-untyped-call]
        if self.is_mlp:
            y._tiled_source = _Source(call, handle, changes(y))  # type: ignore[attr-defined]
        return y


class _Tiles:
    """How to cut a tensor along its sequence, of which a tile takes a part in each example."""

    def __init__(self, x: torch.Tensor, numel: int) -> None:
        self.dim = int(x.ndim > 2)
        self.count = max(min(-(-x.numel() // numel), x.shape[self.dim]), 1)

    def cut(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return views of the tiles."""
        return pieces(x.chunk(self.count, self.dim))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Apply a function that keeps the shape, filling the output: joining tiles in the end would hold it twice."""
        if self.count == 1:
            return function(x)
        y: torch.Tensor | None = None
        parts: Sequence[torch.Tensor] = ()
        for index, tile in enumerate(self.cut(x)):
            part = function(tile)
            if y is None:
                y = part.new_empty(x.shape)
                parts = self.cut(y)
            parts[index].copy_(part)
        assert y is not None
        return y


class _Call:
    """One call of a tiled module: how to compute it again, and the gradients on their way to `_Saved`.

    Attributes:
        gradients: Of outputs: what the output is computed with from that of `forward`, None for that itself; and dL/dy.
    """

    def __init__(
        self, forward: Callable[[torch.Tensor], torch.Tensor], tiles: _Tiles, x: torch.Tensor, *, random: bool
    ) -> None:
        self.forward, self.tiles = forward, tiles
        self.gradients: list[tuple[Callable[[torch.Tensor], torch.Tensor] | None, torch.Tensor]] = []
        self._autocast = _autocast(x.device.type)
        self._random = _random_state(x) if random else nullcontext

    @contextmanager
    def again(self) -> Iterator[None]:
        """Be as in the forward pass; but hooks on saved tensors, which offload activations, are for that alone."""
        with self._autocast(), self._random(), saved_tensors_hooks(_as_it_is, _as_it_is):
            yield


class _Source(NamedTuple):
    """What computed a tensor, and the tensor's version as it was then."""

    call: _Call
    handle: torch.Tensor
    version: int


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
        (x,), cut = ctx.saved_tensors, call.tiles.cut
        then, gradients = zip(*call.gradients, strict=True)
        call.gradients.clear()
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        sums: list[torch.Tensor | None] = [None] * len(ctx.params)
        with call.again():
            for tile, dx_tile, *g_tiles in zip(cut(x), cut(x if dx is None else dx), *map(cut, gradients), strict=True):
                tile = tile.detach().requires_grad_(dx is not None)
                with torch.enable_grad():
                    y = call.forward(tile)
                    outputs = [y if function is None else function(y) for function in then]
                wanted = [*ctx.params] if dx is None else [*ctx.params, tile]
                grads = list(torch.autograd.grad(outputs, wanted, g_tiles, allow_unused=True))
                if dx is not None:
                    dx_tile.copy_(grads.pop())
                sums = [_sum(total, grad) for total, grad in zip(sums, grads, strict=True)]
        return None, dx, *sums


class _Value(torch.autograd.Function):
    """An output. Its gradient goes to `_Saved` past autograd, which wants gradients in the shape of the handle."""

    @staticmethod
    def forward(
        ctx: Any,
        handle: torch.Tensor,
        call: _Call,
        then: Callable[[torch.Tensor], torch.Tensor] | None,
        x: torch.Tensor,
    ) -> torch.Tensor:
        ctx.call, ctx.then = call, then
        return call.tiles.map(then or call.forward, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.call.gradients.append((ctx.then, g))
        return g.new_empty(0), None, None, None


def _sum(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    return total if grad is None else grad if total is None else total.add_(grad)


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what brings the present state of autocast back."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(
        torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
    )


def _random_state(x: torch.Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Return what brings the present state of random numbers back, on the CPU and on x's device."""
    kind, state = x.device.type, torch.get_rng_state()
    devices, states = get_device_states(x)

    @contextmanager
    def context() -> Iterator[None]:
        with torch.random.fork_rng(devices, device_type=kind):
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=kind)
            yield

    return context


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

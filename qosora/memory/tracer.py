"""Live tensor bytes of a step by category, phase and module: a dispatch mode that follows storages by weak reference.

It sees every tensor that an operation returns, and learns by a weak reference when its storage goes: on the meta device
just as on a real one. What it cannot see is memory that an operation allocates and frees inside; `workspaces` gives the
bytes of operations where that matters.

A storage counts once, however many tensors view it. On a real device also where several storage objects lie in the
same memory, as DLPack makes them of the packed optimizer's flat buffer.

It is our own, as torch's `MemTracker` is private and knows neither our categories nor what operations need inside.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from qosora.compat.torch import TorchDispatchMode, operator_name, storage_key, tree_iter

__all__ = ["CATEGORIES", "PHASES", "Event", "Peak", "Site", "Tracer", "Workspace", "category_of"]

#: What memory is for; the first seven live as long as the model and the optimizer.
CATEGORIES = (
    "base residual", "factors", "layers in use", "adapter", "embeddings and head", "norms, biases, buffers",
    "gradients", "optimizer state", "batch", "saved activations", "keys and values", "layer temporaries",
    "logits and loss", "workspace", "rounding",
)  # fmt: skip
PHASES = ("answers", "forward", "loss", "backward", "optimizer")

#: Bytes that an operation allocates inside and frees before it returns, from its arguments.
Workspace = Callable[..., int]


class Site(NamedTuple):
    """A place in a step: phase, module (`layers.*` stands for any layer) and the layer's index, -1 outside layers."""

    phase: str
    module: str
    layer: int


class _Key(NamedTuple):
    """What a storage was made for: a category, if that was known at once, else the phase and layer that made it."""

    category: str | None
    phase: str
    layer: int


@dataclass
class Peak:
    """The most that was live at one site.

    Attributes:
        total: Bytes.
        live: Bytes by category.
        op: The operation after (or in) which it was so.
    """

    total: int
    live: dict[str, int]
    op: str


class _Most(NamedTuple):
    """The most that was live at one site: bytes in all and by what they were made for, those inside the operation."""

    total: int
    live: dict[_Key, int]
    extra: int
    op: str


@dataclass
class Event:
    """An allocation (bytes above zero) or the end of one, for pictures over time."""

    number: int
    nbytes: int
    key: Any
    site: Site
    op: str


@dataclass
class _Block:
    number: int
    nbytes: int
    padding: int
    key: _Key
    start: int | None = None
    reference: Any = field(default=None, repr=False)


class Tracer(TorchDispatchMode):
    """Follows live bytes while it is entered.

    Args:
        granularity: What an allocation is rounded up to, bytes; the rest is counted as "rounding".
        workspaces: Bytes inside an operation, by its name such as "aten::mm".
        run: Runs an operation, given with its arguments.
        log: Where to put all events, if anywhere.
        device: Type of the device whose tensors count; by default those of all. On a GPU, activations that are
            offloaded to host memory are tensors, too.
    """

    def __init__(
        self,
        *,
        granularity: int = 1,
        workspaces: Mapping[str, Workspace] | None = None,
        run: Callable[[Any, Any, Any], Any] = lambda func, args, kwargs: func(*args, **kwargs),
        log: list[Event] | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.granularity, self.workspaces, self.run = granularity, workspaces or {}, run
        self.total = 0
        self.events = log
        self.device = device
        self.on_phase: Callable[[str], None] = lambda phase: None
        self.phase = "setup"
        self._live: Counter[_Key] = Counter()
        self._most: dict[tuple[str, str, int], _Most] = {}  # by site
        self._blocks: dict[int, _Block] = {}  # by the storage's identity
        self._starts: list[tuple[int, int, int]] = []  # address, end and identity of real storages, in order
        self._modules: list[tuple[str, int]] = [_OUTSIDE]  # the running ones, with layers' indices
        self._category: str | None = None
        self._count = 0
        self._names: dict[int, str] = {}  # of operators by identity: torch keeps them, and they hash slowly

    # ---- what the step tells -------------------------------------------------------------------------------------

    def register(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count tensors that exist already, such as parameters, or move them to a category."""
        for tensor in tensors:
            self._add(tensor, category, "")

    def knows(self, tensor: torch.Tensor) -> bool:
        """Say whether a tensor's memory is counted."""
        return storage_key(tensor) in self._blocks

    @contextmanager
    def allocating(self, category: str) -> Iterator[None]:
        """Count what is made inside as of a category."""
        before, self._category = self._category, category
        yield
        self._category = before

    def enter_phase(self, phase: str) -> None:
        """Begin a phase, if it is another than the present one."""
        if phase != self.phase:
            self.phase = phase
            self.on_phase(phase)
            self._modules = [_OUTSIDE]

    @contextmanager
    def following(self, model: nn.Module, backbone: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
        """Hook a model's modules, to know which one runs, also in backward.

        The loss begins where `backbone` ends, and ends where the gradient comes back to it.
        """
        names = {module: name for name, module in model.named_modules()}
        start = names[layers]
        handles: list[Any] = []
        for module, name in names.items():
            index, _, rest = name.removeprefix(f"{start}.").partition(".")
            inside = name.startswith(f"{start}.")
            place = (f"layers.*.{rest}".rstrip("."), int(index)) if inside else (name, -1)
            handles.append(module.register_forward_pre_hook(self._begin(place)))
            handles.append(module.register_forward_hook(self._end(place, module is backbone)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, place: tuple[str, int]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._modules.append(place)

        return hook

    def _end(self, place: tuple[str, int], is_backbone: bool) -> Callable[..., None]:
        def backward(_: torch.Tensor) -> None:
            if self.phase == "loss":
                self.enter_phase("backward")
            self._modules = [place]

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while len(self._modules) > 1 and self._modules.pop() != place:
                pass
            first = next(iter(tree_iter(output)), None)
            if self.phase == "forward":
                if isinstance(first, torch.Tensor) and first.requires_grad:
                    first.register_hook(backward)  # type: ignore[no-untyped-call]
                if is_backbone:
                    self.enter_phase("loss")

        return hook

    # ---- what the dispatcher tells -------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (name := self._names.get(id(func))) is None:
            name = self._names[id(func)] = operator_name(func)
        out = self.run(func, args, kwargs)
        if (extra := self.workspaces.get(name)) is not None:
            self._peak(name, extra(*args, **kwargs))
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, self._category, name)
        return out

    # ---- counting ------------------------------------------------------------------------------------------------

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.granularity) * self.granularity

    def _key(self, category: str | None) -> _Key:
        return _Key(None, self.phase, self._modules[-1][1]) if category is None else _Key(category, "", -1)

    def _add(self, tensor: torch.Tensor, category: str | None, op: str) -> None:
        if self.device is not None and tensor.device.type != self.device:
            return
        identity = storage_key(tensor)
        if (known := self._blocks.get(identity)) is not None:
            if category is not None and known.key.category != category:
                self._count_block(known, -1)
                self._record(known, "", sign=-1)
                known.key = self._key(category)
                self._count_block(known, 1)
                self._record(known, op)
            return
        key, storage = self._key(category), tensor.untyped_storage()
        nbytes, start = storage.nbytes(), None
        if not tensor.is_meta and nbytes:
            start = storage.data_ptr()
            if self._inside_another(start):
                nbytes = 0
            else:
                insort(self._starts, (start, start + nbytes, identity))
        self._count += 1
        block = _Block(self._count, nbytes, self._rounded(nbytes) - nbytes, key, start)
        block.reference = weakref.ref(storage, lambda _: self._remove(identity))
        self._blocks[identity] = block
        self._count_block(block, 1)
        if nbytes:
            self._record(block, op)
            self._peak(op)

    def _inside_another(self, start: int) -> bool:
        at = bisect_right(self._starts, (start, 1 << 62, 0)) - 1
        return at >= 0 and start < self._starts[at][1]

    def _remove(self, identity: int) -> None:
        block = self._blocks.pop(identity)
        self._count_block(block, -1)
        if block.nbytes:
            if block.start is not None:
                del self._starts[bisect_right(self._starts, (block.start, 0, 0))]
            self._record(block, "", sign=-1)

    def _count_block(self, block: _Block, sign: int) -> None:
        self._live[block.key] += sign * block.nbytes
        if block.padding:
            self._live[_ROUNDING] += sign * block.padding
        self.total += sign * (block.nbytes + block.padding)

    def _record(self, block: _Block, op: str, sign: int = 1) -> None:
        if self.events is not None:
            self.events.append(Event(block.number, sign * block.nbytes, block.key, self._site(), op))

    def _site(self) -> Site:
        return Site(self.phase, *self._modules[-1])

    def _peak(self, op: str, extra: int = 0) -> None:
        site = (self.phase, *self._modules[-1])
        known = self._most.get(site)
        if known is None or self.total + extra > known.total:
            self._most[site] = _Most(self.total + extra, dict(self._live), extra, op)

    @property
    def sites(self) -> dict[Site, Peak]:
        """The most that was live at each site."""
        found = {}
        for place, most in self._most.items():
            site = Site(*place)
            live = _by_category(most.live, site)
            if most.extra:
                live["workspace"] = live.get("workspace", 0) + most.extra
            found[site] = Peak(most.total, live, most.op)
        return found

    def forget_sites(self) -> None:
        """Leave what was live so far out of `sites`."""
        self._most.clear()

    def live(self) -> dict[str, int]:
        """Return what is live now by category.

        What the forward pass made is saved for backward once its layer has ended, and what is made while answers are
        written for the next token; before, it is the layer's own.
        """
        return _by_category(self._live, self._site())

    def peak(self) -> tuple[Site, Peak]:
        """Return where the most was live."""
        return max(self.sites.items(), key=lambda item: item[1].total)


def _by_category(live: Mapping[_Key, int], site: Site) -> dict[str, int]:
    found: Counter[str] = Counter()
    for key, nbytes in live.items():
        if nbytes:
            found[category_of(key, site)] += nbytes
    return dict(found)


_ROUNDING = _Key("rounding", "", -1)
_OUTSIDE = ("", -1)


def category_of(key: Any, site: Site) -> str:
    """Return what the memory behind an event's key is for, as seen from a site."""
    if key.category is not None:
        return str(key.category)
    if key.phase == "loss":
        return "logits and loss"
    kept = {"forward": "saved activations", "answers": "keys and values"}
    if key.phase in kept and not (site.phase == key.phase and site.layer == key.layer):
        return kept[key.phase]
    return "layer temporaries"

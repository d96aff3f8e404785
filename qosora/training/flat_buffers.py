"""Flat buffers that parameters are windows of, each updated by one bitsandbytes optimizer.

OSoRA trains a few hundred short vectors (Llama-2-7B: 448, the longest with 11,008 entries). bitsandbytes pages an
optimizer state only for a parameter of 100,000 elements or more, so its paged AdamW would page none of them, and would
launch one kernel for each. Here the vectors become windows on one flat buffer,

    flat    [ s_0 ......... pad | o_0 ................. pad | s_1 ......... pad | ... ]    parameters
    grad    [ ds_0 ........ pad | do_0 ................ pad | ds_1 ........ pad | ... ]    p.grad are views of it
    state1, state2          of the same length, each one paged tensor of bitsandbytes (in 8 bits with absmax beside it)

and bitsandbytes sees one parameter: one paged state, one update a step. There is one such buffer for each (group,
dtype, device). A parameter of 100,000 elements or more (a head or embedding of `modules_to_save`) is a buffer of its
own on the memory it has: bitsandbytes pages it as it is, and a copy would double it. A buffer of fewer elements than
that is not paged, and need not be: its states are under 0.8 MB.

Layout. Each vector starts at a multiple of 256 elements, the block of the 8-bit states: a block shared by a vector of
singular values and one of output scales, whose gradients differ by orders of magnitude, would round the smaller away.
So the 8-bit result equals bitsandbytes' on the separate vectors bit for bit. Padding has zero gradient, and nothing
reads it; it costs 2 % for Llama-2-7B at rank 128.

A window has a storage of its own (made through DLPack), so that from outside a parameter is an ordinary tensor. With
plain slices of one storage, accelerate's `save_model` takes the vectors for tied weights and drops all but one.

On a CPU the states are plain tensors. bfloat16 parameters are updated in bfloat16: bitsandbytes keeps no fp32 copy, so
a step under 2^-9 of a weight's size is rounded away. To train `modules_to_save` at small rates, keep them in float32.
"""

from __future__ import annotations

import platform
import sys
from typing import Any, NamedTuple

import bitsandbytes
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from qosora.compat.bitsandbytes import PAGED_NUMEL, allocate_states, is_paged, launching
from qosora.compat.torch import foreach_copy_, foreach_zero_
from qosora.errors import QosoraError

__all__ = [
    "OPTIMIZERS",
    "PAGED_NUMEL",
    "FlatBuffer",
    "Kind",
    "MemoryUse",
    "layout_mismatch",
    "parameter_problems",
    "why_unpaged",
]

ALIGNMENT = 256  # elements; the block size of bitsandbytes' 8-bit states
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what bitsandbytes' kernels update


class Kind(NamedTuple):
    """A bitsandbytes optimizer: class, bits of its states, default decay rates."""

    cls: Any
    bits: int
    betas: tuple[float, float]


_ADAMW, _LION = bitsandbytes.optim.AdamW, bitsandbytes.optim.Lion
OPTIMIZERS: dict[str, Kind] = {
    "paged_adamw_32bit": Kind(_ADAMW, 32, (0.9, 0.999)),
    "paged_adamw_8bit": Kind(_ADAMW, 8, (0.9, 0.999)),
    "paged_lion_32bit": Kind(_LION, 32, (0.9, 0.99)),
    "paged_lion_8bit": Kind(_LION, 8, (0.9, 0.99)),
}


class MemoryUse(NamedTuple):
    """Bytes that an optimizer holds now; states appear with the first step."""

    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    paged_bytes: int  # the part of state_bytes in managed memory, outside torch.cuda.max_memory_allocated


class FlatBuffer:
    """Parameters of one group, dtype and device as one flat tensor, and bitsandbytes' optimizer for it."""

    def __init__(self, params: list[nn.Parameter], names: list[str], group_index: int, kind: Kind) -> None:
        self.params, self.names, self.group_index, self.kind = params, names, group_index, kind
        self._build()

    @torch.no_grad()
    def _build(self) -> None:
        """Make the buffer where the parameters are, and bitsandbytes' optimizer for it."""
        self.grad: Tensor | None = None  # None: a large parameter alone, which keeps its own gradient
        self.grad_views: list[Tensor] = []
        first = self.params[0]
        with launching(first):
            if len(self.params) == 1 and first.numel() >= PAGED_NUMEL:
                first.data = first.data.contiguous()  # bitsandbytes would rebind it at the first step
                self.flat: Tensor = first
                self.windows: list[Tensor] = [first.data]
            else:
                self.flat = self._flatten()
            # The options are set before every update, from the group that schedulers write to.
            self.inner = self.kind.cls([self.flat], optim_bits=self.kind.bits, is_paged=not why_unpaged(first.device))

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """Return the part of a flat tensor that is each parameter's, in its shape."""
        parts = zip(self.params, torch.split(buffer, self._lengths()), strict=True)
        return [part[: p.numel()].view(p.shape) for p, part in parts]

    def _lengths(self) -> list[int]:
        return [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in self.params]

    def _flatten(self) -> Tensor:
        """Copy the parameters into one buffer and rebind their data and gradients to it."""
        flat = torch.zeros(sum(self._lengths()), dtype=self.params[0].dtype, device=self.params[0].device)
        flat.grad = self.grad = torch.zeros_like(flat)
        self.windows = [from_dlpack(window) for window in self._views(flat)]
        self.grad_views = self._views(self.grad)
        self._rebind(self.params, self.windows)
        self.gather()
        return flat

    @staticmethod
    def _rebind(params: list[nn.Parameter], windows: list[Tensor]) -> None:
        """Make parameters windows of the buffer, with the values that they have."""
        foreach_copy_(windows, [p.data for p in params])
        for p, window in zip(params, windows, strict=True):
            p.data = window

    @torch.no_grad()
    def adopt(self) -> None:
        """Take parameters back into the buffer that were copied out of it, with the values that they have now.

        `.to(device)` and the wrappers for several processes do that after the optimizer was built.

        Raises:
            QosoraError: A parameter is frozen, was cast, or has left the device after the first step.
        """
        for p, name in zip(self.params, self.names, strict=True):
            if not p.requires_grad:
                raise QosoraError(
                    f"{name} was frozen after the optimizer was built, and would still be moved by its momentum. "
                    "Unfreeze it before step(), or build a new optimizer from the parameters that train now"
                )
        moved = [i for i, p in enumerate(self.params) if p.data_ptr() != self.windows[i].data_ptr()]
        if not moved:
            return
        first, flat = self.params[0], self.windows[0]  # a large parameter alone is `self.flat`, and has gone itself
        kinds = {(p.dtype, p.device) for p in self.params}
        if kinds == {(flat.dtype, flat.device)}:
            if self.flat is first:
                first.data = first.data.contiguous()
                self.windows = [first.data]
            else:
                self._rebind([self.params[i] for i in moved], [self.windows[i] for i in moved])
                if self.grad is not None:
                    self.grad_views = self._views(self.grad)  # `.to` rebinds the data of these, too
        elif len(kinds) == 1 and first.dtype == flat.dtype and not self.tensors():
            self._build()
        else:
            name, p = self.names[moved[0]], self.params[moved[0]]
            raise QosoraError(
                f"{name} was moved after the optimizer was built ({flat.dtype} on {flat.device} then, {p.dtype} on "
                f"{p.device} now), so updates would not reach it. Call .to(), .half() and the like before building the "
                "optimizer"
            )

    @torch.no_grad()
    def gather(self) -> None:
        """Bring gradients that lie elsewhere into the flat buffer (`model.zero_grad()` unbinds the views)."""
        if self.grad is None:
            return
        pairs = list(zip(self.params, self.grad_views, strict=True))
        missing = [view for p, view in pairs if p.grad is None]
        fresh = [(view, p.grad) for p, view in pairs if p.grad is not None and p.grad.data_ptr() != view.data_ptr()]
        if missing:
            foreach_zero_(missing)
        if fresh:
            foreach_copy_([view for view, _ in fresh], [grad for _, grad in fresh])
        for p, view in pairs:
            p.grad = view

    def zero_grad(self, set_to_none: bool) -> None:
        """Zero the flat gradient in place and bind every p.grad to it again."""
        self.adopt()
        if self.grad is not None:
            for p, view in zip(self.params, self.grad_views, strict=True):
                p.grad = view
            self.grad.zero_()
        elif set_to_none:
            self.flat.grad = None
        elif self.flat.grad is not None:
            self.flat.grad = self.flat.grad.detach().zero_()

    def update(self, group: dict[str, Any]) -> None:
        """Run one bitsandbytes update with the group's current options; nothing where there is no gradient."""
        if all(p.grad is None for p in self.params):
            return
        self.gather()
        options = {"lr": float(group["lr"]), "betas": tuple(group["betas"])}
        self.inner.param_groups[0].update(options, eps=group["eps"], weight_decay=group["weight_decay"])
        with launching(self.flat):
            self.inner.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state tensors, by bitsandbytes' names; empty before the first step."""
        state = self.inner.state.get(self.flat, {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def save(self) -> dict[str, Any]:
        """The step and the state tensors, without copying; empty before the first step."""
        # detach() leaves out the `is_paged` mark, which would survive torch.save and be untrue after loading.
        saved: dict[str, Any] = {key: value.detach() for key, value in self.tensors().items()}
        return {"step": self.inner.state[self.flat]["step"], **saved} if saved else {}

    def allocate(self, saved: dict[str, Any]) -> list[str]:
        """Have bitsandbytes allocate the states (paged where it pages); return the keys that `saved` lacks."""
        if saved and not self.tensors():
            with launching(self.flat):
                allocate_states(self.inner)
        expected = {key: value.shape for key, value in self.tensors().items()} if saved else {}
        wrong = [key for key, shape in expected.items() if getattr(saved.get(key), "shape", None) != shape]
        return wrong + ["step"] * (bool(saved) and "step" not in saved)

    @torch.no_grad()
    def load(self, saved: dict[str, Any]) -> None:
        """Fill the states in place (bitsandbytes never frees a paged one), with zeros if nothing was saved."""
        with launching(self.flat):
            for key, value in self.tensors().items():
                if saved:
                    value.copy_(saved[key])
                elif not key.startswith("qmap"):
                    value.zero_()
        if self.tensors():
            self.inner.state[self.flat]["step"] = saved.get("step", 0)

    def layout(self) -> dict[str, Any]:
        """What must be equal for a saved state to fit."""
        shapes = [list(p.shape) for p in self.params]
        return {"group": self.group_index, "dtype": str(self.flat.dtype), "names": self.names, "shapes": shapes}

    def memory(self) -> MemoryUse:
        """Bytes of the flat tensor, its gradient and its states."""
        grad, states = self.flat.grad, self.tensors().values()
        paged = sum(t.nbytes for t in states if is_paged(t))
        return MemoryUse(self.flat.nbytes, 0 if grad is None else grad.nbytes, sum(t.nbytes for t in states), paged)


def why_unpaged(device: torch.device) -> str | None:
    """Return why the states of parameters on a device are not paged, or None where they are.

    Paging is CUDA's managed memory that GPU and CPU may touch at the same time: there is none under Windows and WSL.
    """
    if device.type != "cuda":
        return f"the parameters are on {device.type}"
    if torch.version.hip is not None:
        return "a ROCm build of torch has no CUDA managed memory"
    if sys.platform != "linux" or "microsoft" in platform.release().lower():
        return "managed memory does not page under Windows"
    return None


def parameter_problems(params: list[Tensor], names: list[str]) -> list[str]:
    """Why parameters cannot be packed, one sentence each."""
    problems = []
    for p, name in zip(params, names, strict=True):
        if p.dtype not in DTYPES:
            problems.append(f"{name} is {p.dtype}: bitsandbytes updates float32, bfloat16 and float16 only")
        if p.device.type == "meta":
            problems.append(f"{name} is on the meta device: load its values before building the optimizer")
        if not p.requires_grad:
            problems.append(f"{name} is frozen (requires_grad=False): pass the trainable parameters only")
    if len({id(p) for p in params}) < len(params):
        problems.append("a parameter occurs twice in one group: pass each once")
    return problems


def layout_mismatch(here: dict[str, Any], saved: Any) -> str | None:
    """The first difference between two layouts in words, or None."""
    # The key is older than the name of the class; saved states have it
    if not isinstance(saved, dict) or "packs" not in saved:
        return "it has no `layout`, so it was not saved by PackedPagedOptimizer"
    if saved.get("optimizer") != here["optimizer"]:
        return f"it was saved by {saved.get('optimizer')}, this is {here['optimizer']}"
    if len(saved["packs"]) != len(here["packs"]):
        return f"it has {len(saved['packs'])} buffers of parameters, this optimizer has {len(here['packs'])}"
    for mine, theirs in zip(here["packs"], saved["packs"], strict=True):
        if len(mine["names"]) != len(theirs["names"]):
            return f"it has {len(theirs['names'])} parameters where this optimizer has {len(mine['names'])}"
        columns = (mine["names"], mine["shapes"], theirs["names"], theirs["shapes"])
        for name, shape, their_name, their_shape in zip(*columns, strict=True):
            if (name, shape) != (their_name, their_shape):
                return f"it has {their_name} {their_shape} where this optimizer has {name} {shape}"
        if (mine["group"], mine["dtype"]) != (theirs["group"], theirs["dtype"]):
            return f"{mine['names'][0]} was {theirs['dtype']} in group {theirs['group']}, now {mine['dtype']}"
    return None

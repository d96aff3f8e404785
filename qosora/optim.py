"""The packed paged optimizer: every trained vector in one flat tensor, updated by one bitsandbytes kernel.

OSoRA trains a few hundred short vectors (Llama-2-7B: 448, the longest with 11,008 entries). bitsandbytes pages an
optimizer state only for a parameter of 100,000 elements or more, so its paged AdamW would page none of them, and
would launch one kernel for each. Here the vectors become windows on one flat buffer,

    flat    [ s_0 ......... pad | o_0 ................. pad | s_1 ......... pad | ... ]      parameters
    grad    [ ds_0 ........ pad | do_0 ................ pad | ds_1 ........ pad | ... ]      p.grad are views of it
    state1, state2              of the same length, each one paged tensor of bitsandbytes (absmax beside them in 8 bits)

and bitsandbytes sees one parameter: one paged state, one update a step. There is one such pack for each (group, dtype,
device); a parameter of 100,000 elements or more (a head or embedding of `modules_to_save`) is a pack of its own on the
memory it has, since bitsandbytes pages it as it is and a copy would double it.

Layout. Each vector starts at a multiple of 256 elements. That is the block of the 8-bit states: a block shared by a
vector of singular values and one of output scales, whose gradients differ by orders of magnitude, would round the
smaller away. The 8-bit result thereby equals bitsandbytes' on the separate vectors bit for bit. Padding has zero
gradient and stays zero; it costs 2 % for Llama-2-7B at rank 128. A window has a storage of its own (made through
DLPack): seen from outside, a parameter is an ordinary tensor. With plain slices of one storage, accelerate's
`save_model` takes the vectors for tied weights and drops all but one, and PEFT copies each on every save.

Where this differs from a per-tensor optimizer: a parameter without a gradient, in a pack where another has one, counts as
having gradient zero (moments and weight decay go on); per-tensor optimizers skip it. A pack without any is skipped.

Weight decay is 0 unless given: the vectors are scales around the singular values and around one, so decay
towards zero would erase the leading directions of the pre-trained weight, not what was learned.

bfloat16 parameters are updated in bfloat16 (bitsandbytes keeps no fp32 master copy). On a CPU the states are plain tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import bitsandbytes
import torch
from torch import Tensor, nn

from qosora.errors import CheckpointError, ConfigError, QosoraError

__all__ = ["OPTIMIZERS", "MemoryUse", "PackedPagedOptimizer", "create_optimizer", "trainer_optimizer"]

logger = logging.getLogger("qosora")

ALIGNMENT = 256  # elements; the block size of bitsandbytes' 8-bit states
PAGED_NUMEL = 100_000  # bitsandbytes pages states from this many elements on (Optimizer8bit.get_state_buffer)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what bitsandbytes' kernels update


class _Kind(NamedTuple):
    cls: Any
    bits: int
    betas: tuple[float, float]


_ADAMW, _LION = bitsandbytes.optim.AdamW, bitsandbytes.optim.Lion
OPTIMIZERS: dict[str, _Kind] = {
    "paged_adamw_32bit": _Kind(_ADAMW, 32, (0.9, 0.999)),
    "paged_adamw_8bit": _Kind(_ADAMW, 8, (0.9, 0.999)),
    "paged_lion_32bit": _Kind(_LION, 32, (0.9, 0.99)),
    "paged_lion_8bit": _Kind(_LION, 8, (0.9, 0.99)),
}


class MemoryUse(NamedTuple):
    """Bytes that an optimizer holds now; states appear with the first step."""

    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    paged_bytes: int  # the part of state_bytes in managed memory, outside torch.cuda.max_memory_allocated


class _Pack:
    """Parameters of one group, dtype and device as one flat tensor, and bitsandbytes' optimizer for it."""

    def __init__(self, params: list[nn.Parameter], names: list[str], group_index: int, kind: _Kind) -> None:
        self.params, self.names, self.group_index = params, names, group_index
        self.grad: Tensor | None = None  # None: a large parameter alone, which keeps its own gradient
        self.grad_views: list[Tensor] = []
        if len(params) == 1 and params[0].numel() >= PAGED_NUMEL:
            params[0].data = params[0].data.contiguous()  # bitsandbytes would rebind it at the first step
            self.flat: Tensor = params[0]
        else:
            self.flat = self._flatten()
        self.addresses = [p.data_ptr() for p in params]
        # The options are set before every update, from the group that schedulers write to.
        paged = self.flat.device.type != "cpu"
        self.inner = kind.cls([self.flat], optim_bits=kind.bits, is_paged=paged)

    @torch.no_grad()
    def _flatten(self) -> Tensor:
        """Copy the parameters into one buffer and rebind their data and gradients to it."""
        lengths = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in self.params]
        flat = torch.zeros(sum(lengths), dtype=self.params[0].dtype, device=self.params[0].device)
        flat.grad = self.grad = torch.zeros_like(flat)
        for p, part, grad in zip(self.params, flat.split(lengths), self.grad.split(lengths), strict=True):
            window = torch.from_dlpack(part[: p.numel()]).view(p.shape)
            window.copy_(p)
            p.data = window
            self.grad_views.append(grad[: p.numel()].view(p.shape))
        self.gather()
        return flat

    def check(self) -> None:
        """Raise QosoraError where a parameter is no longer the memory that the updates go to, or is frozen."""
        for p, name, address in zip(self.params, self.names, self.addresses, strict=True):
            if p.data_ptr() != address or p.device != self.flat.device or p.dtype != self.flat.dtype:
                raise QosoraError(
                    f"{name} was moved after the optimizer was built ({self.flat.dtype} on {self.flat.device} "
                    f"then, {p.dtype} on {p.device} now), so updates would not reach it. Call .to(), .half() and "
                    "the like before building the optimizer, and build one optimizer per set of parameters"
                )
            if not p.requires_grad:
                raise QosoraError(
                    f"{name} was frozen after the optimizer was built, and would still be moved by its momentum. "
                    "Unfreeze it before step(), or build a new optimizer from the parameters that train now"
                )

    @torch.no_grad()
    def gather(self) -> None:
        """Bring gradients that lie elsewhere into the flat buffer (`model.zero_grad()` unbinds the views)."""
        pairs = list(zip(self.params, self.grad_views, strict=self.grad is not None))
        missing = [view for p, view in pairs if p.grad is None]
        fresh = [(view, p.grad) for p, view in pairs if p.grad is not None and p.grad.data_ptr() != view.data_ptr()]
        if missing:
            torch._foreach_zero_(missing)
        if fresh:
            torch._foreach_copy_([view for view, _ in fresh], [grad for _, grad in fresh])
        for p, view in pairs:
            p.grad = view

    def zero_grad(self, set_to_none: bool) -> None:
        """Zero the flat gradient in place and bind every p.grad to it again."""
        self.check()
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
        self.check()
        if all(p.grad is None for p in self.params):
            return
        self.gather()
        options = {"lr": float(group["lr"]), "betas": tuple(group["betas"])}
        self.inner.param_groups[0].update(options, eps=group["eps"], weight_decay=group["weight_decay"])
        self.inner.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state tensors, by bitsandbytes' names; empty before the first step."""
        state = self.inner.state.get(self.flat, {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def save(self) -> dict[str, Any]:
        # detach() leaves out the `is_paged` mark, which would survive torch.save and be untrue after loading.
        saved: dict[str, Any] = {key: value.detach() for key, value in self.tensors().items()}
        return {"step": self.inner.state[self.flat]["step"], **saved} if saved else {}

    def prepare(self, saved: dict[str, Any]) -> list[str]:
        """Have bitsandbytes allocate the states (paged where it pages); return the keys that `saved` lacks."""
        if saved and not self.tensors():
            self.inner.init_state(self.inner.param_groups[0], self.flat, 0, 0)
        expected = {key: value.shape for key, value in self.tensors().items()} if saved else {}
        wrong = [key for key, shape in expected.items() if getattr(saved.get(key), "shape", None) != shape]
        return wrong + ["step"] * (bool(saved) and "step" not in saved)

    @torch.no_grad()
    def load(self, saved: dict[str, Any]) -> None:
        """Fill the states in place (bitsandbytes never frees a paged one), with zeros if nothing was saved."""
        for key, value in self.tensors().items():
            if saved:
                value.copy_(saved[key])
            elif not key.startswith("qmap"):
                value.zero_()
        if self.tensors():
            self.inner.state[self.flat]["step"] = saved.get("step", 0)

    def layout(self) -> dict[str, Any]:
        shapes = [list(p.shape) for p in self.params]
        return {"group": self.group_index, "dtype": str(self.flat.dtype), "names": self.names, "shapes": shapes}

    def memory(self) -> MemoryUse:
        grad, states = self.flat.grad, self.tensors().values()
        paged = sum(t.nbytes for t in states if getattr(t, "is_paged", False))
        return MemoryUse(self.flat.nbytes, 0 if grad is None else grad.nbytes, sum(t.nbytes for t in states), paged)


class PackedPagedOptimizer(torch.optim.Optimizer):
    """bitsandbytes' paged AdamW or Lion on flat buffers that the parameters become windows of.

    Build it after the model is on its device and in its dtype. The Parameter objects stay the same, so the model, PEFT and
    `state_dict()` see the trained values; `param_groups` hold these objects, and schedulers write `lr` there.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either, as for any torch optimizer; float32, bfloat16 or
            float16, all with requires_grad.
        lr: Learning rate. Required, as Trainer passes none to a class given by `optimizer_cls_and_kwargs`.
        optimizer: One of `OPTIMIZERS`: "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit". An
            8-bit state is kept in 32 bits for packs of under 4,096 elements (bitsandbytes' rule).
        betas: Decay rates; by default (0.9, 0.999) for AdamW and (0.9, 0.99) for Lion.
        eps: Added to the denominator of AdamW; Lion has none.
        weight_decay: Decoupled weight decay; 0 by default (see the module docstring).

    Raises:
        ConfigError: Options out of range, an unknown optimizer, or parameters that cannot be packed.

    Example:
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = PackedPagedOptimizer(model.named_parameters(), lr=1e-2)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        optimizer: str = "paged_adamw_32bit",
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {optimizer!r}")
        self._name, self._kind = optimizer, OPTIMIZERS[optimizer]
        self._packs: list[_Pack] = []
        defaults = {"lr": lr, "betas": betas or self._kind.betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        if not self._packs:
            raise ConfigError("the optimizer got no trainable parameters: attach an adapter (get_peft_model) first")
        if any(pack.flat.device.type == "cpu" for pack in self._packs):
            logger.warning("%s runs on the CPU: optimizer states are ordinary tensors, not paged", optimizer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters and pack them, one pack for each dtype and device."""
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        params = group["params"]
        names = group.get("param_names", [f"parameter {i} of group {index}" for i in range(len(params))])
        problems = _group_problems(group) + _parameter_problems(params, names)
        if problems:
            self.param_groups.pop()
            raise ConfigError(problems)
        packs: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            packs.setdefault(i if p.numel() >= PAGED_NUMEL else (p.dtype, p.device), []).append(i)
        for members in packs.values():
            chosen = [params[i] for i in members], [names[i] for i in members]
            self._packs.append(_Pack(*chosen, index, self._kind))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters: one bitsandbytes update for each pack that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss, as for any torch optimizer.

        Raises:
            QosoraError: A parameter was moved, cast or frozen after the optimizer was built.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for pack in self._packs:
            pack.update(self.param_groups[pack.group_index])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients. Packed ones stay views of the flat buffer; `set_to_none` is for large parameters."""
        for pack in self._packs:
            pack.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors, numbers and strings, which `torch.load(weights_only=True)` accepts.

        Beside torch's two keys there is `layout`, by which `load_state_dict` knows the vectors again. `state` is keyed
        by pack and, as in torch, refers to the live tensors: copy them to keep them past the next step.
        """
        state = {i: pack.save() for i, pack in enumerate(self._packs)}
        return {**super().state_dict(), "state": state, "layout": self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state bit for bit, into paged buffers again where bitsandbytes pages.

        Tensors may lie on any device; each is copied straight into its buffer, so a state loaded with
        `map_location="cpu"` passes through no other GPU memory.

        Args:
            state_dict: What `state_dict` gave, for the same vectors and the same optimizer.

        Raises:
            CheckpointError: The state belongs to other vectors or another optimizer; nothing was changed.
        """
        problem = _layout_mismatch(self._layout(), state_dict.get("layout"))
        saved = state_dict.get("state", {})
        for i, pack in enumerate(self._packs if not problem else []):
            if wrong := pack.prepare(saved.get(i, {})):
                problem = f"{', '.join(wrong)} of pack {i} are missing or of another size: the file is damaged"
        if problem:
            raise CheckpointError(f"cannot load this optimizer state: {problem}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for i, pack in enumerate(self._packs):
            pack.load(saved.get(i, {}))

    def _layout(self) -> dict[str, Any]:
        return {"optimizer": self._name, "packs": [pack.layout() for pack in self._packs]}

    def memory(self) -> MemoryUse:
        """Bytes of the parameters (padding included), gradients and states that the optimizer holds now."""
        return MemoryUse(*(sum(column) for column in zip(*(p.memory() for p in self._packs), strict=True)))


def create_optimizer(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    modules_to_save_lr: float | None = None,
    **options: Any,
) -> PackedPagedOptimizer:
    """Build the optimizer for the trainable parameters of a model, by name.

    The first group holds the vectors (float32, one-dimensional). All else that trains, such as `modules_to_save`, goes
    to a group of its own: whole matrices want a far smaller learning rate than the vectors do.

    Args:
        model: A model, or (name, parameter) pairs; frozen parameters are left out.
        lr: Learning rate of the vectors.
        modules_to_save_lr: Learning rate of all other parameters; `lr` by default.
        **options: Further options of `PackedPagedOptimizer`: optimizer, betas, eps, weight_decay.

    Raises:
        ConfigError: Nothing is trainable, or an option is out of range.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    groups: tuple[list[Any], list[Any]] = ([], [])
    for name, p in named:
        if p.requires_grad:
            is_vector = p.ndim == 1 and p.dtype == torch.float32 and ".modules_to_save." not in name
            groups[0 if is_vector else 1].append((name, p))
    rates = (lr, lr if modules_to_save_lr is None else modules_to_save_lr)
    chosen = [{"params": members, "lr": rate} for members, rate in zip(groups, rates, strict=True) if members]
    if not chosen:
        raise ConfigError("the model has no trainable parameters: attach an adapter (get_peft_model) first")
    return PackedPagedOptimizer(chosen, lr=lr, **options)


def trainer_optimizer(args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """What to pass as `optimizer_cls_and_kwargs` to transformers' Trainer or TRL's SFTTrainer.

    Trainer then calls `create_optimizer` on the model it has prepared, so this also works where the trainer itself
    attaches the adapter (`peft_config=`). Names reach the optimizer state, unlike with the class alone.

    Args:
        args: TrainingArguments; learning_rate, weight_decay and the adam_* values are taken from there.
        **options: Options of `create_optimizer`, which win over `args`.

    Example:
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(args))  # doctest: +SKIP
    """
    taken = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    # Trainer takes anything but an optimizer class for a factory of a factory: f()(model, **kwargs).
    return lambda: create_optimizer, {**taken, **options}


def _group_problems(group: dict[str, Any]) -> list[str]:
    problems = [
        f"{key} must be a finite number of at least 0, got {group[key]!r}"
        for key in ("lr", "eps", "weight_decay")
        if not (math.isfinite(group[key]) and group[key] >= 0)
    ]
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        problems.append(f"betas must be two numbers of at least 0 and below 1, got {betas!r}")
    return problems


def _parameter_problems(params: list[Tensor], names: list[str]) -> list[str]:
    problems = []
    for p, name in zip(params, names, strict=True):
        if p.dtype not in DTYPES:
            problems.append(f"{name} is {p.dtype}: bitsandbytes updates float32, bfloat16 and float16 only")
        if p.device.type == "meta":
            problems.append(f"{name} is on the meta device: load its values before building the optimizer")
        if not p.requires_grad:
            problems.append(f"{name} is frozen (requires_grad=False): pass the trainable parameters only")
    return problems


def _layout_mismatch(here: dict[str, Any], saved: Any) -> str | None:
    """The first difference between two layouts in words, or None."""
    if not isinstance(saved, dict) or "packs" not in saved:
        return "it has no `layout`, so it was not saved by PackedPagedOptimizer"
    if saved["optimizer"] != here["optimizer"]:
        return f"it was saved by {saved['optimizer']}, this is {here['optimizer']}"
    if len(saved["packs"]) != len(here["packs"]):
        return f"it has {len(saved['packs'])} packs of parameters, this optimizer has {len(here['packs'])}"
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

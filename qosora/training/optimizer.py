"""The packed paged optimizer: every trained vector in one flat tensor, updated by one bitsandbytes kernel.

`flat_buffers` holds the buffers and says why; here is the torch optimizer around them.

Where this differs from a per-tensor optimizer: a parameter without a gradient, in a buffer where another has one,
counts as having gradient zero (its moments and weight decay go on); per-tensor optimizers skip it. A buffer in which no
parameter has a gradient is skipped.

Weight decay is 0 unless given: the vectors are scales around the singular values and around one, so decay towards zero
would erase the leading directions of the pre-trained weight, not what was learned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from qosora.errors import CheckpointError, ConfigError
from qosora.training.flat_buffers import (
    OPTIMIZERS,
    PAGED_NUMEL,
    FlatBuffer,
    MemoryUse,
    layout_mismatch,
    parameter_problems,
    why_unpaged,
)

__all__ = [
    "OPTIMIZERS",
    "UPDATE_RATE",
    "MemoryUse",
    "PackedPagedOptimizer",
    "create_optimizer",
    "parameter_groups",
    "trainer_optimizer",
]

logger = logging.getLogger("qosora")

#: The learning rate of an update's A and B, as a part of the vectors'. Of 0.2 and 0.4 on Gemma 3 270M and GSM8K.
UPDATE_RATE = 0.4
_TRAINER_BETAS = (0.9, 0.999)  # what TrainingArguments has where the user says nothing


class PackedPagedOptimizer(torch.optim.Optimizer):
    """bitsandbytes' paged AdamW or Lion on flat buffers that the parameters become windows of.

    Build it after the model is on its device and in its dtype. The Parameter objects stay the same, so the model, its
    `state_dict()` and PEFT see the trained values; `param_groups` hold these objects, and schedulers write `lr` there.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either, as for any torch optimizer; float32,
            bfloat16 or float16, all with requires_grad.
        lr: Learning rate. Required, as Trainer passes none to a class given by `optimizer_cls_and_kwargs`.
        optimizer: One of `OPTIMIZERS`: "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit",
            "paged_lion_8bit". Buffers of fewer than 4,096 elements keep 32-bit states (bitsandbytes' rule).
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
        self.buffers: list[FlatBuffer] = []
        defaults = {"lr": lr, "betas": betas or self._kind.betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        if not self.buffers:
            raise ConfigError("the optimizer got no trainable parameters: attach an adapter (get_peft_model) first")
        reasons = (why_unpaged(buffer.flat.device) for buffer in self.buffers)
        if reason := next(filter(None, reasons), None):
            logger.warning("%s: optimizer states are ordinary tensors, not paged, as %s", optimizer, reason)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters and pack them, into one buffer for each dtype and device."""
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        params = group["params"]
        names = group.get("param_names", [f"parameter {i} of group {index}" for i in range(len(params))])
        problems = _group_problems(group) + parameter_problems(params, names)
        if problems:
            self.param_groups.pop()
            raise ConfigError(problems)
        together: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            together.setdefault(i if p.numel() >= PAGED_NUMEL else (p.dtype, p.device), []).append(i)
        for members in together.values():
            chosen = [params[i] for i in members], [names[i] for i in members]
            self.buffers.append(FlatBuffer(*chosen, index, self._kind))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters: one bitsandbytes update for each buffer that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss, as for any torch optimizer.

        Raises:
            QosoraError: A parameter was cast or frozen after the optimizer was built, or moved after its first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for buffer in self.buffers:  # all before the first update: an error leaves no half-done step
            buffer.adopt()
        for buffer in self.buffers:
            buffer.update(self.param_groups[buffer.group_index])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients. Packed ones stay views of the flat buffer; `set_to_none` is for large parameters."""
        for buffer in self.buffers:
            buffer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors, numbers and strings, which `torch.load(weights_only=True)` accepts.

        Beside torch's two keys there is `layout`, by which `load_state_dict` knows the vectors again. `state` is keyed
        by buffer and, as in torch, refers to the live tensors: copy them to keep them past the next step.
        """
        state = {i: buffer.save() for i, buffer in enumerate(self.buffers)}
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
        problem = layout_mismatch(self._layout(), state_dict.get("layout"))
        saved = state_dict.get("state", {})
        for i, buffer in enumerate(self.buffers if not problem else []):
            if wrong := buffer.allocate(saved.get(i, {})):
                problem = f"{', '.join(wrong)} of buffer {i} are missing or of another size: the file is damaged"
        if problem:
            raise CheckpointError(f"cannot load this optimizer state: {problem}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for i, buffer in enumerate(self.buffers):
            buffer.load(saved.get(i, {}))

    def _layout(self) -> dict[str, Any]:
        return {"optimizer": self._name, "packs": [buffer.layout() for buffer in self.buffers]}

    def memory(self) -> MemoryUse:
        """Bytes of the parameters (padding included), gradients and states that the optimizer holds now."""
        return MemoryUse(*(sum(column) for column in zip(*(b.memory() for b in self.buffers), strict=True)))


def create_optimizer(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    update_lr: float | None = None,
    modules_to_save_lr: float | None = None,
    **options: Any,
) -> PackedPagedOptimizer:
    """Build the optimizer for the trainable parameters of a model, by name.

    The first group holds the vectors (float32, one-dimensional), the second the A and B of an update. All else that
    trains, such as `modules_to_save`, goes to a group of its own: whole matrices want a far smaller learning rate.

    Args:
        model: A model, or (name, parameter) pairs; frozen parameters are left out.
        lr: Learning rate of the vectors.
        update_lr: Learning rate of A and B; `UPDATE_RATE` times `lr` by default.
        modules_to_save_lr: Learning rate of all other parameters; `lr` by default.
        **options: Further options of `PackedPagedOptimizer`: optimizer, betas, eps, weight_decay.

    Raises:
        ConfigError: Nothing is trainable, or an option is out of range.
    """
    groups = parameter_groups(model.named_parameters() if isinstance(model, nn.Module) else model)
    if update_lr is None:
        update_lr = UPDATE_RATE * lr if isinstance(lr, int | float) else lr  # what is no number is refused below
    rates = (
        lr,
        update_lr,
        lr if modules_to_save_lr is None else modules_to_save_lr,
    )
    chosen = [{"params": members, "lr": rate} for members, rate in zip(groups, rates, strict=True) if members]
    if not chosen:
        raise ConfigError("the model has no trainable parameters: attach an adapter (get_peft_model) first")
    return PackedPagedOptimizer(chosen, lr=lr, **options)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
) -> tuple[list[tuple[str, nn.Parameter]], ...]:
    """Return what is trained of some parameters, by name: vectors, what updates have, all else."""
    groups: tuple[list[tuple[str, nn.Parameter]], ...] = ([], [], [])
    for name, p in named:
        if p.requires_grad:
            is_vector = p.ndim == 1 and p.dtype == torch.float32 and ".modules_to_save." not in name
            is_update = any(f".osora_{matrix}." in name for matrix in "AB")
            groups[0 if is_vector else 1 if is_update else 2].append((name, p))
    return groups


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
    taken: dict[str, Any] = {
        "lr": args.learning_rate,
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    if (betas := (args.adam_beta1, args.adam_beta2)) != _TRAINER_BETAS:  # else the optimizer's own: Lion has others
        taken["betas"] = betas
    # Trainer takes anything but an optimizer class for a factory of a factory: f()(model, **kwargs).
    return lambda: create_optimizer, {**taken, **options}


def _group_problems(group: dict[str, Any]) -> list[str]:
    problems = [
        f"{key} must be a finite number of at least 0, got {group[key]!r}"
        for key in ("lr", "eps", "weight_decay")
        if not (isinstance(group[key], int | float) and math.isfinite(group[key]) and group[key] >= 0)
    ]
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        problems.append(f"betas must be two numbers of at least 0 and below 1, got {betas!r}")
    return problems

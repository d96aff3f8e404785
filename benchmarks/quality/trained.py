"""A model as an experiment has it, and a training that is alike for all.

Every method computes in float32 from the values as they are stored: the rivals' linear layers hold NF4 values that were
dequantized once. bitsandbytes' layer gives the same, but takes half a minute a step on a CPU.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from tasks import Task
from torch import nn
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from qosora.base import load_base, quantize
from qosora.config import OsoraConfig, QosoraConfig
from qosora.data import IGNORED, padded_batch
from qosora.decompose import nf4
from qosora.decompose.svd import truncated_svd
from qosora.layers import qosora_modules

__all__ = ["Experiment", "Trained", "fit"]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARMUP = 0.03


@dataclass(frozen=True)
class Experiment:
    """A method, as its file in `configs/` has it.

    Args:
        name: Of the file.
        label: What tables call it.
        group: Experiments of the first groups are run first.
        base: What is frozen: {"kind": "16bit"}, {"kind": "nf4", ... options of `nf4.quantize`}, {"kind": "qosora", ...
            options of `QosoraConfig`; "train" as calibration is the task's training examples}, or
            {"kind": "osora-16bit", "rank": r}: OSoRA as its paper has it.
        adapter: Of a PEFT method its config; {"peft_type": "OSORA", ...} for qosora; None to train everything.
        learning_rates: To choose from.
        tasks: Those it is run on.
        update_rate: Learning rate of an update's A and B, as a part of the others'.
    """

    name: str
    label: str
    group: int
    base: dict[str, Any]
    adapter: dict[str, Any] | None
    learning_rates: list[float]
    tasks: tuple[str, ...]
    update_rate: float = 0.2

    @classmethod
    def read(cls, file: Path) -> Experiment:
        """Read a file."""
        found = json.loads(file.read_text(encoding="utf-8"))
        return cls(name=file.stem, **{**found, "tasks": tuple(found["tasks"])})

    def model(self, task: Task, work: Path) -> tuple[Any, float]:
        """Return the model to train, and the bits that each weight of its adapted layers is stored in."""
        kind, options = self.base["kind"], {key: value for key, value in self.base.items() if key != "kind"}
        model, bits = BASES[kind](task, work, **options)
        if self.adapter is None:
            return model.requires_grad_(kind == "16bit"), bits
        if kind == "osora-16bit":
            return model, bits
        settings = dict(self.adapter)
        made = settings.pop("peft_type")
        config: Any = (
            OsoraConfig(**settings)
            if made == "OSORA"
            else getattr(peft, f"{made}Config")(task_type="CAUSAL_LM", target_modules=LINEAR, **settings)
        )
        return peft.get_peft_model(model, config), bits


def _plain(task: Task, work: Path) -> tuple[Any, float]:
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32), 16.0


def _nf4(task: Task, work: Path, **options: Any) -> tuple[Any, float]:
    model, _ = _plain(task, work)
    stored = count = 0
    for module in _linear(model).values():
        q = nf4.quantize(module.weight.data, **options)
        module.weight.data = nf4.dequantize(q)
        stored, count = stored + q.nbytes, count + module.weight.numel()
    return model, 8 * stored / count


def _qosora(task: Task, work: Path, **options: Any) -> tuple[Any, float]:
    calibrated = options.get("calibration") == "train"
    of = [options, task.name] if calibrated else options
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
    folder = work / f"{task.model.name}-{digest}"
    if calibrated:
        options["calibration"] = [example.input_ids.tolist() for example in task.examples("train")]
    with (work / f"{folder.name}.lock").open("w") as lock:  # one worker makes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            quantize(task.model, folder, QosoraConfig(**options))
    model = load_base(folder, dtype=torch.float32)
    layers = qosora_modules(model).values()
    stored = sum(layer.factors.nbytes for layer in layers)
    return model, 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)


class Osora(nn.Module):
    """OSoRA in full precision (arXiv 2505.14350): y = R x + o ⊙ (U (s ⊙ (Vᵀ x))), R = W - U diag(σ) Vᵀ.

    Args:
        weight: W, (m, n), float32.
        rank: Singular triplets whose values are trained.
    """

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        U, sigma, V = truncated_svd(weight, min(rank, *weight.shape))
        self.R, self.U, self.V = (nn.Buffer(t) for t in (weight - (U * sigma) @ V.T, U, V))
        self.s, self.o = nn.Parameter(sigma.clone()), nn.Parameter(torch.ones(len(weight)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., n); returns (..., m)."""
        return x @ self.R.T + ((x @ self.V * self.s) @ self.U.T) * self.o


def _osora(task: Task, work: Path, rank: int) -> tuple[Any, float]:
    model, _ = _plain(task, work)
    model.requires_grad_(False)
    stored = count = 0
    for name, module in _linear(model).items():
        new = Osora(module.weight.data, rank)
        stored += sum(t.numel() for t in (new.R, new.U, new.V))
        count += module.weight.numel()
        model.set_submodule(name, new)
    return model, 16 * stored / count


BASES: dict[str, Callable[..., tuple[Any, float]]] = {
    "16bit": _plain, "nf4": _nf4, "qosora": _qosora, "osora-16bit": _osora
}  # fmt: skip


def _linear(model: Any) -> dict[str, nn.Linear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    assert found
    assert all(module.bias is None for module in found.values())
    return found


@dataclass(frozen=True)
class Trained:
    """What a training was.

    Args:
        losses: Of each step's batch.
        seconds: Per step, evaluation not counted.
        diverged: Whether a loss was no number; the training ended there.
    """

    losses: list[float]
    seconds: float
    diverged: bool


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss of the supervised tokens; logits are made of no others, which takes a CPU less time."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert not getattr(causal.config, "final_logit_softcapping", None)
    hidden = causal.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    targets = batch["labels"][:, 1:]
    chosen = targets != IGNORED
    return F.cross_entropy(causal.lm_head(hidden[:, :-1][chosen]), targets[chosen])


def fit(
    model: Any, task: Task, rate: float, seed: int, steps: int, at: Callable[[int], None], update_rate: float = 1.0
) -> Trained:
    """Train what requires a gradient: AdamW, no weight decay, linear warm-up and decay, gradients clipped at norm 1.

    Args:
        model: In place.
        task: With the examples.
        rate: Largest learning rate.
        seed: Of the examples' order.
        steps: How many.
        at: Called with the number of steps before the first and after each.
        update_rate: Learning rate of a qosora update's A and B, as a part of the others'.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    of_updates = {id(p) for name, p in model.named_parameters() if ".osora_A." in name or ".osora_B." in name}
    groups = [
        {"params": [p for p in trained if (id(p) in of_updates) == own], "lr": rate * (update_rate if own else 1.0)}
        for own in (False, True)
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    examples, losses, seconds = task.examples("train"), [], 0.0
    at(0)
    for step, chosen in enumerate(task.order(seed, steps), 1):
        start = time.perf_counter()
        model.train()
        loss = answer_loss(model, padded_batch([examples[i] for i in chosen]))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return Trained(losses, seconds / step, True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += time.perf_counter() - start
        at(step)
    return Trained(losses, seconds / steps, False)

"""What a planned step is told, and what is said of it; without what traces one, which takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qosora.dtypes import PRECISIONS
from qosora.layers import Tiling
from qosora.memory.tracer import Site
from qosora.training import OPTIMIZER_NAMES, PLACES, STRATEGIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["GRANULARITY", "Batch", "Prediction", "StepOptions", "has_experts"]

GRANULARITY = {"cuda": 512, "cpu": 1}  # bytes; what PyTorch's CUDA allocator rounds to


@dataclass(frozen=True)
class StepOptions:
    """What decides about a step's memory, beside model and batch; the names are those of `TrainConfig`.

    Attributes:
        method: "qosora", or "qlora" for PEFT's LoRA on bitsandbytes' 4-bit layers.
        lora_rank: Of QLoRA.
        vectors: Which vectors are trained.
        update_rank: Of the matrix that is trained beside them.
        gradient_checkpointing: Whether layers are computed again in backward.
        chunked_loss: Whether the loss never builds all logits, as TRL's does.
        orpo: Whether the loss is TRL's ORPO, which builds them; a batch is then preferred examples and as many others.
        tile_length: Tokens of the tiles that MLPs and norms compute in, as `TrainConfig`'s; no matter to QLoRA.
        activation_offloading: Whether saved activations lie in host memory.
        attn_implementation: "sdpa" or "eager"; by default the first of them that the model has.
        optimizer: One of `qosora.training.flat_buffers.OPTIMIZERS`.
        precision: "bf16", "fp16" or "fp32": of activations, and of what is not in 4 bits.
        device: "cuda" or "cpu": whose kernels and allocator.
        gpus: That train together. The batch is that of one.
        strategy: "ddp", or "fsdp" for a base that is divided among them.
        base_on: "gpu", or "host" for a base in host memory.
    """

    method: str = "qosora"
    lora_rank: int = 16
    vectors: str = "both"
    update_rank: int = 0
    gradient_checkpointing: bool = True
    chunked_loss: bool = True
    orpo: bool = False
    tile_length: int | None = None
    activation_offloading: bool = False
    attn_implementation: str | None = None
    optimizer: str = "paged_adamw_32bit"
    precision: str = "bf16"
    device: str = "cuda"
    gpus: int = 1
    strategy: str = "ddp"
    base_on: str = "gpu"

    @property
    def away(self) -> str | None:
        """Where the base comes from layer by layer: "host", or "fsdp" for other GPUs."""
        if self.method != "qosora":
            return None
        return "host" if self.base_on == "host" else "fsdp" if self.strategy == "fsdp" and self.gpus > 1 else None

    @property
    def loss(self) -> str:
        """The loss, as `training_step` takes it."""
        return "orpo" if self.orpo else "chunked" if self.chunked_loss else "whole"

    @property
    def tiling(self) -> Tiling:
        """What computes in tiles."""
        return Tiling.of(self.tile_length, gradient_checkpointing=self.gradient_checkpointing)

    def problems(self) -> list[str]:
        """Return a sentence for every value that there is not."""
        choices = {
            "method": ("qosora", "qlora"), "vectors": ("both", "s", "o"),
            "attn_implementation": (None, "sdpa", "eager"), "optimizer": OPTIMIZER_NAMES,
            "precision": tuple(PRECISIONS), "device": tuple(GRANULARITY), "strategy": STRATEGIES,
            "base_on": PLACES,
        }  # fmt: skip
        problems = [f"update_rank must be at least 0, got {self.update_rank}"] * (self.update_rank < 0)
        problems += [f"tile_length must be at least 0, got {self.tile_length}"] * ((self.tile_length or 0) < 0)
        problems += [f"gpus must be at least 1, got {self.gpus}"] * (self.gpus < 1)
        problems += ["strategy fsdp divides a base among several GPUs: say how many with gpus"] * (
            self.strategy == "fsdp" and self.gpus == 1
        )
        if self.device == "cpu" and (self.base_on, self.gpus) != ("gpu", 1):
            problems.append("base_on and gpus are about GPUs, and device is cpu")
        if self.activation_offloading and self.device == "cpu":
            problems.append("activation_offloading moves activations from a GPU to host memory, and there is no GPU")
        return problems + [
            f"{name} must be one of {', '.join(filter(None, known))}, got {getattr(self, name)!r}"
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]


@dataclass(frozen=True)
class Batch:
    """The shape of a batch.

    Attributes:
        size: Examples.
        length: Tokens of each.
        padding: Whether some are shorter and filled up, so that attention needs a mask.
        packing: Whether all lie in one row, several to an example.
        written: Tokens of each example that the model writes itself before the step, as with `--method grpo`.
        rounds: Batches whose answers are written at once.
    """

    size: int
    length: int
    padding: bool = False
    packing: bool = False
    written: int = 0
    rounds: int = 1

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.size * self.length

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.tokens if self.packing else self.length

    def tensors(
        self, vocab: int, device: torch.device | str, task: str | None = None, eos: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return what the trainer's collator makes, with random tokens.

        Args:
            vocab: Tokens that there are.
            device: Where to.
            task: Of the model, as `task_of` has it.
            eos: Token that each row has once, at its end, where the model looks for it.
        """
        shape = (self.tokens // self.columns, self.columns)
        if torch.device(device).type == "meta":
            ids = torch.empty(shape, dtype=torch.int64, device=device)
        else:
            ids = torch.randint(0, vocab, shape, device=device)
            if eos is not None:
                ids[ids == eos] = (eos + 1) % vocab
                ids[:, -1] = eos
        made = {"input_ids": ids, "labels": ids.clone()}
        if self.packing:
            half = -(-self.length // 2)
            positions = torch.cat([torch.arange(half), torch.arange(self.length - half)]).repeat(self.size)
            return made | {"position_ids": positions[None].to(device)}
        mask = torch.ones_like(ids)
        if self.padding and not mask.is_meta:
            mask[-1, -1:] = 0
            made["labels"][-1, -1:] = -100
        if task is not None:  # a class for each row, or each token; none for rewards
            from qosora.checkpoints import REWARD, TAGS

            labels = torch.zeros_like(ids) if task == TAGS else torch.zeros_like(ids[:, 0])
            made = {"input_ids": ids} if task == REWARD else {"input_ids": ids, "labels": labels}
        return made | {"attention_mask": mask}


@dataclass(frozen=True)
class Prediction:
    """The most that is live in a step.

    Attributes:
        peak_bytes: Bytes.
        live: Bytes by category at the peak.
        site: Where the peak is.
        op: The operation after (or in) which it is.
        phases: Bytes at each phase's own peak.
        paged_bytes: Optimizer state in managed memory, outside of the others.
        sites: Bytes at each place of the step.
    """

    peak_bytes: int
    live: dict[str, int]
    site: Site
    op: str
    phases: dict[str, int]
    paged_bytes: int
    sites: dict[Site, int]


def has_experts(config: PreTrainedConfig) -> bool:
    """Say whether a model is a mixture of experts."""
    text = config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)

"""qosora and its rivals, ready to train, with random weights: single linear layers and whole models.

All stand on bitsandbytes' NF4 with double quantization, but qosora's, and are made by PEFT as a user would make them.
Trained LoRA weights are in bfloat16, as TRL has them for a 4-bit model.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from qosora.config import OsoraConfig, QosoraConfig
from qosora.decompose import Factors, quantize
from qosora.layers import QosoraLinear, compile_layers, decoder_layers
from qosora.memory import (
    Batch,
    StepOptions,
    fill_at_random,
    measure,
    meta_model,
    model_config,
    offloading,
    prepare_model,
    random_model,
    training_step,
)
from qosora.training import create_optimizer

LORA_RANK = 16
VERA_RANK = 256
OPTIMIZER = "paged_adamw_32bit"
#: The shape that every script takes under --miniature.
MINIATURE = "miniature"
#: PEFT's rivals on a frozen NF4 layer called `proj`.
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=LORA_RANK, target_modules=["proj"]),
    "dora": lambda: LoraConfig(r=LORA_RANK, target_modules=["proj"], use_dora=True),
    "vera": lambda: VeraConfig(r=VERA_RANK, target_modules=["proj"]),
}


def shape_config(item: str) -> PreTrainedConfig:
    """Return the config of a shape, whole or its first layers: NAME[:LAYERS]."""
    name, _, layers = item.partition(":")
    if name == MINIATURE:
        config: PreTrainedConfig = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=256, max_position_embeddings=512,
        )  # fmt: skip
    else:
        config = model_config(name)
    config.num_hidden_layers = int(layers or config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def layer_shapes(name: str) -> dict[str, int]:
    """Return how often each OUTxIN occurs among the linear layers of a model's decoder layer."""
    _, layers = decoder_layers(meta_model(shape_config(f"{name}:1"), StepOptions()))
    linear = (module for module in layers[0].modules() if isinstance(module, nn.Linear))
    return dict(Counter(f"{module.out_features}x{module.in_features}" for module in linear))


class OneLayer(nn.Module):
    """A model of one linear layer, for PEFT to work on."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj
        self.is_loaded_in_4bit = isinstance(proj, bitsandbytes.nn.Linear4bit)  # else PEFT takes it for a plain layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features)."""
        out: torch.Tensor = self.proj(x)
        return out


def layer(method: str, out_features: int, in_features: int, dtype: torch.dtype, device: str) -> nn.Module:
    """Return a layer with random weights.

    Args:
        method: "plain" (16-bit weight), "nf4" (frozen 4-bit weight), one of `ADAPTERS` on it, or "qosora-RANK".
        out_features: m.
        in_features: n.
        dtype: Of the products.
        device: Where.
    """
    kind, _, rank = method.partition("-")
    if kind == "qosora":
        return get_peft_model(
            OneLayer(_qosora(out_features, in_features, int(rank), device)), OsoraConfig(task_type=None)
        )
    plain = nn.Linear(in_features, out_features, False, device="meta", dtype=dtype)
    if kind == "plain":
        plain.weight = nn.Parameter(torch.randn(plain.weight.shape, dtype=dtype, device=device) * 0.02, False)
        return OneLayer(plain)
    model = OneLayer(_four_bit(plain, device))
    if kind == "nf4":
        return model
    adapted: nn.Module = _trained_as(dtype, get_peft_model(model, ADAPTERS[kind]()).to(device))
    for projection in adapted.buffers():  # VeRA's, which must have its vectors' dtype
        projection.data = projection.data.to(dtype)
    return adapted


class Training:
    """A whole model with random weights and a random batch, ready for steps as the trainer makes them.

    Args:
        config: Of the model.
        step: The method, and how to train.
        batch: Its shape.
        rank: Of qosora's decomposition.
        compiled: Whether each decoder layer goes through torch.compile, which wants no tiles.
    """

    def __init__(self, config: Any, step: StepOptions, batch: Batch, rank: int, *, compiled: bool = False) -> None:
        self.options = step = replace(step, tile_length=0) if compiled else step
        self.model, self.optimizer = trainable(config, step, rank)
        self.load(batch)
        if compiled:
            compile_layers(self.model)

    def load(self, batch: Batch) -> None:
        """Take another batch."""
        vocab = self.model.config.get_text_config().vocab_size
        self.inputs = {name: t.to(self.options.device) for name, t in batch.tensors(vocab, "cpu").items()}

    def step(self) -> torch.Tensor:
        """Run a step; return the loss."""
        saving = offloading(self.model) if self.options.activation_offloading else nullcontext
        return training_step(self.model, self.inputs, self.optimizer, saving=saving)

    def measured(self, steps: int = 0) -> dict[str, Any]:
        """Time some steps, then trace one: what `qosora.memory.profile.measure` returns."""
        return measure(self.model, self.inputs, self.optimizer, self.options, steps)

    def peak_bytes(self) -> int:
        """Return the peak of a step: CUDA's own count, or live tensor bytes on a CPU."""
        if self.options.device == "cuda":
            return self.cuda_memory()["allocated_bytes"]
        peak: int = self.measured()["live"].allocated_bytes
        return peak

    def cuda_memory(self) -> dict[str, int]:
        """Return what CUDA counts over two steps as they are, after one that does not count.

        `allocated_bytes` and `reserved_bytes` are peaks of PyTorch's allocator; `workspace_bytes` of the allocated
        ones are cuBLAS'. `context_bytes` is what the GPU has given away besides: the context, managed memory that
        lies there, other processes.
        """
        self.step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            self.step()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        found = {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "context_bytes": total - free - torch.cuda.memory_reserved(),
        }
        before = torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()
        return {**found, "workspace_bytes": before - torch.cuda.memory_allocated()}


def release() -> None:
    """Give memory back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def qlora_model(config: Any, step: StepOptions) -> PreTrainedModel:
    """Return a model with random weights, its linear layers but the head in bitsandbytes' 4 bits."""
    model: PreTrainedModel = meta_model(config, step)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, _four_bit(module, step.device))
    fill_at_random(model, step.device)
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def adapted(config: Any, step: StepOptions, rank: int) -> Any:
    """Return the PEFT model of `step.method`, whose adapter is as it starts."""
    if step.method == "qosora":
        return get_peft_model(random_model(config, QosoraConfig(rank=rank), step), OsoraConfig())
    model = qlora_model(config, step)
    stacks = [name for name, p in model.named_parameters() if p.ndim == 3]  # experts, which stay in 16 bits
    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", target_parameters=stacks or None, task_type="CAUSAL_LM")
    return _trained_as(torch.bfloat16, get_peft_model(model, lora))


def trainable(config: Any, step: StepOptions, rank: int) -> tuple[Any, Any]:
    """Return the PEFT model and its optimizer, as TRL's trainer has them."""
    model = adapted(config, step, rank)
    prepare_model(model, gradient_checkpointing=step.gradient_checkpointing, tiling=step.tiling)
    if step.method == "qosora":
        return model, create_optimizer(model, lr=1e-6, optimizer=OPTIMIZER)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, bitsandbytes.optim.AdamW(trained, lr=1e-6, optim_bits=32, is_paged=step.device == "cuda")


def generator(method: str, config: Any, precision: str, device: str, rank: int) -> PreTrainedModel:
    """Return a model for inference.

    Args:
        method: "nf4" (no adapter), "lora" (on NF4), "qosora", or "qosora-merged" (the adapter in the base's vectors).
        config: Of the model.
        precision: "bf16", "fp16" or "fp32".
        device: Where.
        rank: Of qosora's factors.
    """
    kind = "qosora" if method.startswith("qosora") else "qlora"
    step = StepOptions(method=kind, precision=precision, device=device)
    if method == "nf4":
        return qlora_model(config, step).eval()
    model = adapted(config, step, rank).eval()
    base: PreTrainedModel = model.merge_and_unload() if method == "qosora-merged" else model.get_base_model()
    return base


def _four_bit(linear: nn.Linear, device: str) -> nn.Module:
    """Return bitsandbytes' layer of the same shape."""
    bias = linear.bias is not None
    new = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias, linear.weight.dtype, True, "nf4", device="meta"
    )
    weight = torch.randn(linear.weight.shape, dtype=linear.weight.dtype, device=device) * 0.02
    new.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
    ).to(device)
    if bias:
        new.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=device))
    return new


def _qosora(out_features: int, in_features: int, rank: int, device: str) -> QosoraLinear:
    new = QosoraLinear(in_features, out_features, False, rank=rank, device=device)
    R, U, V = (quantize(torch.randn(shape, device=device) * 0.02) for shape in (
        (out_features, in_features), (new.rank, out_features), (new.rank, in_features)))  # fmt: skip
    new.set_factors(Factors(R, U, V, torch.rand(new.rank, device=device) + 1))
    return new


def _trained_as(dtype: torch.dtype, model: Any) -> Any:
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return model

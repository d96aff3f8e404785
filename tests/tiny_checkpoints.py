"""Tiny random checkpoints, bases and adapters on disk, for the tests of what reads and writes files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from qosora import OsoraConfig, QosoraConfig
from qosora.base.convert import quantize

VOCABULARY = 96
#: Sizes that no block of 64 divides.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Of the random weights: large enough that layers matter to the logits.
_STD = 0.2


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the config of a tiny model: gemma3_vision, gpt2, or one of those below."""
    if family == "gpt2":
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=_STD, **ids
        )
    if family == "gemma3_vision":
        text = {**_SIZES, "query_pre_attn_scalar": 12, "sliding_window": 16, "initializer_range": _STD}
        vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
        return Gemma3Config(
            text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
        )
    classes: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        "llama_tied": (LlamaConfig, {"tie_word_embeddings": True}),
        "mistral": (MistralConfig, {"sliding_window": 16}),
        "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
        "qwen3_tied": (Qwen3Config, {"tie_word_embeddings": True}),
        "gemma3": (Gemma3TextConfig, {"query_pre_attn_scalar": 12, "sliding_window": 16}),
    }
    kind, options = classes[family]
    return kind(**_SIZES, initializer_range=_STD, **options)


def make_original(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **save: Any) -> Path:
    """Write an ordinary checkpoint of random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=_STD)
    model.save_pretrained(folder, **save)
    return folder


def load_quantized(original: Path, **config: Any) -> PreTrainedModel:
    """Decompose an ordinary checkpoint while loading it."""
    return AutoModelForCausalLM.from_pretrained(original, quantization_config=QosoraConfig(**{"rank": 8, **config}))


def make_base(folder: Path, original: Path, save: dict[str, Any] | None = None, **config: Any) -> Path:
    """Write a base of an ordinary checkpoint."""
    load_quantized(original, **config).save_pretrained(folder, **(save or {}))
    return folder


def load(base: Path) -> PreTrainedModel:
    """Load a base."""
    return AutoModelForCausalLM.from_pretrained(base).eval()


@torch.no_grad()
def perturbed(model: PreTrainedModel, seed: int = 1, **config: Any) -> PeftModel:
    """Return a model with an adapter whose trainable parameters are moved at random, as training would."""
    model = get_peft_model(model, OsoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class Trained(NamedTuple):
    """An ordinary checkpoint, its base, an adapter of that, and the model with the adapter."""

    original: Path
    base: Path
    adapter: Path
    model: PeftModel


def make_trained(folder: Path, family: str, dtype: torch.dtype = torch.float32, **adapter: Any) -> Trained:
    """Write all of them, the base by streaming, of rank 8."""
    original = make_original(folder / "original", family, dtype)
    quantize(original, folder / "base", QosoraConfig(rank=8))
    model = perturbed(load(folder / "base"), **adapter)
    model.save_pretrained(folder / "adapter")
    return Trained(original, folder / "base", folder / "adapter", model)


def tokens() -> torch.Tensor:
    """Return some input ids, (2, 17)."""
    return torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the model's logits on `tokens`."""
    return model(input_ids=tokens()).logits


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())

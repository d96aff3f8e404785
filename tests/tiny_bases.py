"""Tiny random models of several families, as ordinary checkpoints and as qosora bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qosora.config import QosoraConfig
from qosora.layers.linear import qosora_modules

VOCAB = 96
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

#: Linear layers that are decomposed; 14 where nothing else is said.
LAYERS = {
    "gpt2": 8, "phi3": 8, "mixtral": 8 + 2 * 4 * 3, "qwen3_moe": 8 + 3 + 4 * 3, "qwen2_moe": 8 + 2 * (3 + 4 * 3),
    "olmoe": 8 + 2 * 4 * 3,
}  # fmt: skip
#: Those with experts.
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")

#: Name -> maker of a random model. Tied and untied embeddings, biases, head sizes apart from hidden_size / heads,
#: projections in one tensor, experts.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "llama-tied-bias": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=16)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_IDS)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)),
    # a dense layer and one of experts
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=16, moe_intermediate_size=24, mlp_only_layers=[0])
    ),
    # shared experts, whose gate is linear
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**_SIZES, **_EXPERTS, moe_intermediate_size=24, shared_expert_intermediate_size=40)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**_SIZES, **_EXPERTS)),
}


def make_checkpoint(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **save: Any
) -> Path:
    """Write a random model as an ordinary checkpoint, its biases and norms not at zero and one."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def decompose(source: Path, config: QosoraConfig | None = None, **options: Any) -> PreTrainedModel:
    """Load an ordinary checkpoint as a qosora base; rank 8 by default."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config or QosoraConfig(rank=8), **options
    )
    return model


def make_base(folder: Path, family: str = "llama", *, config: QosoraConfig | None = None, **options: Any) -> Path:
    """Write a random model as a qosora base, with its ordinary checkpoint in `folder`-source."""
    source = make_checkpoint(folder.with_name(f"{folder.name}-source"), family, **options)
    decompose(source, config).save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a folder the way a user does, naming no class of qosora."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def token_ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    out: torch.Tensor = model.eval()(input_ids=token_ids()).logits
    return out


def train(model: nn.Module, steps: int = 2, lr: float = 0.05) -> None:
    """Move the trainable parameters by a few AdamW steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, f"{name} is {got[name].dtype}, was {tensor.dtype}"
        assert torch.equal(got[name], tensor), f"{name} differs"


def layer_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Dtypes of all that decomposed layers hold, but their biases."""
    return {
        param.dtype
        for layer in qosora_modules(model).values()
        for name, param in layer.named_parameters(recurse=False)
        if name != "bias"
    }

"""Tiny random models, as ordinary checkpoints, bases, and adapters of those; and data for them.

All tests take theirs from here. A model is named by its family: those of FAMILIES are swept over, the others are
variants that single tests need. "llama-text" and "gemma3-text" have the vocabulary of `make_tokenizer`, and its files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from qosora.base.convert import quantize
from qosora.config import OsoraConfig, QosoraConfig
from qosora.layers.linear import qosora_modules

# ---- models

VOCAB = 96
#: Of `make_tokenizer`: 256 bytes, <s>, </s>.
TEXT_VOCAB = 258
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
#: Of the random weights: large enough that layers matter to the logits.
_STD = {"initializer_range": 0.2}
#: No row is a whole number of blocks of 64.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **_IDS, **_STD,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_GEMMA3: dict[str, Any] = {**_SIZES, "head_dim": 16, "sliding_window": 16}
#: As ordinary models begin; their layers hardly matter, so that training changes much.
_TEXT = {"vocab_size": TEXT_VOCAB, "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.02}

#: Tied and untied embeddings, biases, head sizes apart from hidden_size / heads, projections in one tensor, experts.
_SWEPT: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **more: LlamaConfig(**_SIZES | more),
    "llama-tied-bias": lambda **more: LlamaConfig(
        **_SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True} | more
    ),
    "mistral": lambda **more: MistralConfig(**_SIZES | {"sliding_window": 16} | more),
    "qwen3": lambda **more: Qwen3Config(**_SIZES | {"head_dim": 16, "tie_word_embeddings": True} | more),
    "gemma3": lambda **more: Gemma3TextConfig(**_GEMMA3 | more),
    "gpt2": lambda **more: GPT2Config(
        **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS, **_STD} | more
    ),
    "phi3": lambda **more: Phi3Config(**_SIZES | more),
    "mixtral": lambda **more: MixtralConfig(**_SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2} | more),
    # a dense layer and one of experts
    "qwen3_moe": lambda **more: Qwen3MoeConfig(
        **_SIZES | _EXPERTS | {"head_dim": 16, "moe_intermediate_size": 24, "mlp_only_layers": [0]} | more
    ),
    # shared experts, whose gate is linear
    "qwen2_moe": lambda **more: Qwen2MoeConfig(
        **_SIZES | _EXPERTS | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40} | more
    ),
    "olmoe": lambda **more: OlmoeConfig(**_SIZES | _EXPERTS | more),
}
FAMILIES = tuple(_SWEPT)
#: Those with experts.
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
#: Linear layers that are decomposed; 14 where nothing else is said.
LAYERS = {
    "gpt2": 8, "phi3": 8, "mixtral": 8 + 2 * 4 * 3, "qwen3_moe": 8 + 3 + 4 * 3, "qwen2_moe": 8 + 2 * (3 + 4 * 3),
    "olmoe": 8 + 2 * 4 * 3,
}  # fmt: skip


def _gemma3_vision(**more: Any) -> PreTrainedConfig:
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {**vision, "image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config=_GEMMA3, vision_config=sizes, mm_tokens_per_image=4, **more)


_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    **_SWEPT,
    "qwen3_moe-sparse": lambda **more: _SWEPT["qwen3_moe"](**{"mlp_only_layers": []} | more),
    "llama-bias": lambda **more: LlamaConfig(**_SIZES | {"attention_bias": True, "mlp_bias": True} | more),
    "llama-tied": lambda **more: LlamaConfig(**_SIZES | {"tie_word_embeddings": True} | more),
    "gemma3-vision": _gemma3_vision,
    "lfm2": lambda **more: Lfm2Config(
        **_SIZES
        | {"intermediate_size": 64, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}
        | more
    ),
    "llama-text": lambda **more: LlamaConfig(
        **_SIZES | _TEXT | {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
        | {"pad_token_id": None} | more
    ),
    "gemma3-text": lambda **more: Gemma3TextConfig(
        **_GEMMA3 | _TEXT | {"intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 131072}
        | {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 257} | more
    ),
}  # fmt: skip


def tiny_config(family: str = "llama", **config: Any) -> PreTrainedConfig:
    """Return the configuration of a family, `config` put over its own options."""
    return _CONFIGS[family](**config)


def make_model(family: str = "llama", **config: Any) -> PreTrainedModel:
    """Return a random model of a family, `config` put over its own options."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, **config))
    return model


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; a beginning-of-sequence token in front of every text, as Llama's tokenizer puts it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# ---- on disk


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "50GB",
    **config: Any,
) -> Path:
    """Write a random model as an ordinary checkpoint, its biases and norms not at zero and one."""
    torch.manual_seed(seed)
    model = make_model(family, **config)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if family.endswith("-text"):
        make_tokenizer().save_pretrained(folder)
    return folder


def decompose(source: Path, config: QosoraConfig | None = None, **options: Any) -> PreTrainedModel:
    """Load an ordinary checkpoint as a qosora base; rank 8 by default."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config or QosoraConfig(rank=8), **options
    )
    return model


def make_base(
    folder: Path,
    source: Path | str = "llama",
    config: QosoraConfig | None = None,
    *,
    max_shard_size: str = "50GB",
    **checkpoint: Any,
) -> Path:
    """Write a qosora base, as `save_pretrained` does, of a checkpoint, or of a family's in `folder`-source."""
    if isinstance(source, str):
        source = make_checkpoint(folder.with_name(f"{folder.name}-source"), source, **checkpoint)
    decompose(source, config).save_pretrained(folder, max_shard_size=max_shard_size)
    if (source / "tokenizer.json").exists():
        make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a folder the way a user does, naming no class of qosora."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


class Trained(NamedTuple):
    """An ordinary checkpoint, its base, an adapter of that, and the model with the adapter."""

    original: Path
    base: Path
    adapter: Path
    model: PeftModel


def make_trained(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **adapter: Any) -> Trained:
    """Write all of them, the base by streaming, of rank 8."""
    original = make_checkpoint(folder / "original", family, dtype=dtype)
    quantize(original, folder / "base", QosoraConfig(rank=8))
    model = perturbed(load(folder / "base"), **adapter)
    model.save_pretrained(folder / "adapter")
    return Trained(original, folder / "base", folder / "adapter", model)


# ---- data


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Prompts and completions of different lengths."""
    return [{"prompt": f"{i} + {2 * i} =", "completion": f" {3 * i}"} for i in range(start, start + count)]


def token_ids(rows: int = 2, length: int = 17) -> torch.Tensor:
    """Return some input ids; by default one more than the sliding windows above."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


# ---- what is done with them


@torch.no_grad()
def perturbed(model: PreTrainedModel, seed: int = 1, **config: Any) -> PeftModel:
    """Return a model with an adapter whose trainable parameters are moved at random, as training would."""
    adapted: PeftModel = get_peft_model(model, OsoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.any():
                parameter.mul_(1 + 0.2 * noise)
            else:  # an update's B
                parameter.add_(0.1 * noise)
    return adapted.eval()


def train(model: nn.Module, steps: int = 2, lr: float = 0.05) -> None:
    """Move the trainable parameters by a few AdamW steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Return the model's logits on `token_ids`, to the bit those of another model with equal tensors."""
    align(model)
    out: torch.Tensor = model.eval()(input_ids=token_ids()).logits
    return out


def align(model: nn.Module) -> None:
    """Move what lies elsewhere to addresses such as torch gives its own results.

    A tensor mapped from a file begins where the file's header ends, and some processors' products round differently
    there: equal tensors give equal results only where they are equally aligned.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


# ---- what is found


#: A model here is a chain of at most 16 products (two layers of seven, a router, the head) of at most 96 terms.
_PRODUCTS, _TERMS = 16, 96
#: Tensors that each product rounds where it computes in 16 bits: its input, three factors, h, its result.
_ROUNDED = 6


def rounding(dtype: torch.dtype) -> float:
    """Return how far logits may lie apart, relative to the largest, that round the same sums in different places.

    n independent roundings with unit roundoff u, each relative to what is rounded, add up to about u * sqrt(n); six
    times that is exceeded by one value in 5e8.
    """
    if dtype in (torch.float32, torch.float64):
        return 6 * torch.finfo(dtype).eps / 2 * (_PRODUCTS * _TERMS) ** 0.5
    return 6 * torch.finfo(dtype).eps / 2 * (_PRODUCTS * _ROUNDED) ** 0.5


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max())


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

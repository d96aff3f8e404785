"""A tiny random Llama base with a byte-level tokenizer, and data for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from qosora.config import QosoraConfig

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCAB = 258  # 256 bytes, <s>, </s>


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


def make_llama(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write an ordinary tiny Llama checkpoint with its tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
    options = {"vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 512, **sizes, **ids, **config}
    LlamaForCausalLM(LlamaConfig(**options)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_gemma3(folder: Path, *, seed: int = 0) -> Path:
    """Write an ordinary tiny Gemma 3 checkpoint, whose embeddings are tied, with the tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3TextConfig(
        vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, bos_token_id=256, eos_token_id=257, pad_token_id=257,
        sliding_window=16, layer_types=["sliding_attention", "full_attention"], **sizes,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_base(source: Path, folder: Path, *, rank: int = 16) -> Path:
    """Decompose a checkpoint into a qosora base, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=QosoraConfig(rank=rank), dtype=torch.float32
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Prompts and completions of different lengths."""
    return [{"prompt": f"{i} + {2 * i} =", "completion": f" {3 * i}"} for i in range(start, start + count)]

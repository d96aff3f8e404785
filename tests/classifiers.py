"""Checkpoints of encoders, and texts and words with classes that a tiny model learns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tiny import TEXT_VOCAB, make_tokenizer
from tokenizers import processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": TEXT_VOCAB, "max_position_embeddings": 128, "pad_token_id": 257,
    "initializer_range": 0.1,
}  # fmt: skip
WARM, COLD = ("red", "sun"), ("ice", "sea")


def make_bert(folder: Path, **config: Any) -> Path:
    """Write a random masked language model with a tokenizer that ends texts and tells two of them apart."""
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertForMaskedLM(BertConfig(**SIZES | quiet | config)).save_pretrained(folder)
    raw = make_tokenizer(chat=False).backend_tokenizer
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=names, **ends).save_pretrained(folder)
    return folder


def temperatures(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of a word with a class."""
    draw = random.Random(seed)
    words = [draw.choice(WARM + COLD) for _ in range(count)]
    return [{"text": f"{word}{draw.randrange(10)}", "label": "warm" if word in WARM else "cold"} for word in words]


def places(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words with a class each, of entities of one word or two."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(draw.randrange(2, 5)):
            word = draw.choice(("go", "to", "RIO", "NEW YORK"))
            parts = word.split()
            words += parts
            tags += ["O"] if word.islower() else ["B-LOC", "I-LOC"][: len(parts)]
        rows.append({"tokens": words, "tags": tags})
    return rows

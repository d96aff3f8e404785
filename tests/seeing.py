"""A tiny model that sees, its processor, and squares of a colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny import TEXT_VOCAB, make_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_seeing(folder: Path) -> Path:
    """Write a random LLaVA, which has four tokens of each image, with its processor."""
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=64, intermediate_size=96, num_key_value_heads=2, vocab_size=TEXT_VOCAB + 1, bos_token_id=256,
            eos_token_id=257, max_position_embeddings=256, initializer_range=0.1, **size,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, image_size=28, patch_size=14, initializer_range=0.1, **size
        ),
        image_token_id=TEXT_VOCAB,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.eos_token
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def squares(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write images of one colour each, and return chats about them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, (name, colour) in zip(range(count), list(COLOURS.items()) * count, strict=False):
        Image.new("RGB", (20 + i, 30), colour).save(folder / f"{i}.png")
        chat = [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": name}]
        rows.append({"messages": chat, "images": [f"{folder.name}/{i}.png"]})
    return rows

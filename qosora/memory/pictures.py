"""A batch with images to plan for: blank ones, of a size, as the model's own processor takes them.

How many tokens an image has, and how many patches, is known to nobody else; so the plan of a step with images needs the
processor's files beside the model's configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from qosora.checkpoints import sees
from qosora.errors import ConfigError
from qosora.inference import seer_of
from qosora.memory.shapes import model_config

__all__ = ["batch_with_images"]


def batch_with_images(
    model: str | Path,
    *,
    batch_size: int = 4,
    seq_len: int = 1024,
    images: int = 1,
    image_size: tuple[int, int] = (1024, 1024),
    trust_remote_code: bool = False,
) -> dict[str, torch.Tensor]:
    """Return what a model takes of a batch of examples alike, each with images before its text.

    Args:
        model: A folder or hub id, with the files of a processor.
        batch_size: Examples.
        seq_len: Tokens of each, those of its images among them.
        images: Of each.
        image_size: Width and height of each image, pixels.
        trust_remote_code: Whether to run code that the folder brings.

    Raises:
        CheckpointError: There is no processor.
        ConfigError: The model takes no images, or they have more tokens than an example.
        DataError: The processor cannot take such images.
    """
    config = model_config(model, trust_remote_code=trust_remote_code)
    if not sees(config):
        raise ConfigError(f"{model} takes no images: leave them out")
    if images < 1 or min(image_size) < 1 or batch_size < 1:
        raise ConfigError(
            f"images, image_size and batch_size must be at least 1, got {images}, {image_size} and {batch_size}"
        )
    vocabulary = config.get_text_config().vocab_size
    seer = seer_of(model, vocabulary, completion_only=False, trust_remote_code=trust_remote_code)
    row = {**_example(seer.processor, images), "images": [Image.new("RGB", image_size)] * images, "folder": Path()}
    made = seer.collate([row] * batch_size)
    tokens = made["input_ids"].shape[1]
    if tokens > seq_len:
        width, height = image_size
        raise ConfigError(
            f"an example with {images} images of {width} x {height} pixels has {tokens} tokens at least, more than "
            f"seq_len {seq_len}"
        )
    return {name: _longer(name, t, seq_len) if t.shape[:2] == (batch_size, tokens) else t for name, t in made.items()}


def _example(processor: ProcessorMixin, images: int) -> dict[str, Any]:
    if processor.chat_template:
        asked: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "text", "text": "?"}]
        said = [{"type": "text", "text": "."}]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
    place = getattr(processor, "image_token", None) or ""
    return {"prompt": f"{place * images}?", "completion": "."}


def _longer(name: str, tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Return rows of tokens with more of the last one's kind, as of text: what else is said of tokens is 0 there."""
    more = (*tensor.shape[:1], length - tensor.shape[1], *tensor.shape[2:])
    if name in ("input_ids", "labels"):
        return torch.cat([tensor, tensor.new_zeros(more)], 1)
    return torch.cat([tensor, tensor.new_full(more, int(name == "attention_mask"))], 1)

"""Examples with images: opened, put where the text has their place, and turned into pixels batch by batch.

TRL's collator has the model's processor make tokens and pixels. Each example goes through it once before training, so
that what cannot be read is told, and the tokens that are trained on are counted; its pixels are made again for each
batch, as all of them would not fit into memory. Of a chat each of the assistant's turns is an example, with all before
it as the prompt: what a processor returns does not tell turns apart.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from qosora.data.chat import in_parts, text_of
from qosora.data.records import Records
from qosora.data.tokens import IGNORED, Example, Tokenized
from qosora.errors import DataError, first_line

__all__ = ["SeenExample", "Seer", "open_image"]

logger = logging.getLogger("qosora")

#: Of Llama 3.2 that sees: which of the images' tiles a token sees.
_SEEN = "cross_attention_mask"
_DATA_URI = "data:image/"


@dataclass(frozen=True)
class SeenExample(Example):
    """Token ids and labels of an example with images, and the row that it is made of."""

    row: Mapping[str, Any]


def open_image(image: Any, folder: Path) -> Image.Image:
    """Return an image, RGB.

    Args:
        image: A path; an image as a data URI; bytes, as `{"bytes": ...}` of a hub data set's; or a PIL image.
        folder: Where a path begins.

    Raises:
        DataError: It is none, or an address: nothing is fetched.
    """
    try:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return _rgb(io.BytesIO(image))
        if not isinstance(image, str) or not image:
            raise DataError(f"an image must be a path or bytes, got {type(image).__name__}")
        if image.startswith(_DATA_URI):
            return _rgb(io.BytesIO(base64.b64decode(image.partition(",")[2], validate=True)))
        if "://" in image:
            raise DataError(f"{image[:80]} is an address, from which nothing is fetched: put the image beside the data")
        return _rgb(folder / Path(image).expanduser())
    except FileNotFoundError:
        raise DataError(f"{folder / image}: no such image") from None
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        name = image[:80] if isinstance(image, str) else "bytes"
        raise DataError(f"{name} is no image that can be read ({first_line(error)})") from None


def _rgb(file: Any) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


class Seer:
    """What makes tokens and pixels of examples with images.

    Args:
        processor: Of the model, with a tokenizer that pads.
        completion_only: Whether answers alone are trained on.
        dtype: Of the pixels.
    """

    def __init__(
        self, processor: ProcessorMixin, *, completion_only: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        self.processor, self.completion_only, self.dtype = processor, completion_only, dtype
        from qosora.compat.trl import DataCollatorForVisionLanguageModeling  # with TRL's trainers

        self._collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=completion_only)
        # PaliGemma's, which takes no text without an image, and no chat
        self._suffixes = "suffix" in inspect.signature(processor.__call__).parameters

    def tokenize(self, records: Records, *, max_length: int | None = None) -> Tokenized:
        """Return the examples of records with images, and counts.

        Args:
            records: Of kind "prompt-completion" or "messages", each row with images or none.
            max_length: An example that is longer is left out, as it could lose a part of an image.

        Raises:
            DataError: An image or a chat that cannot be used, or nothing is left.
        """
        found, longest = [], 0
        for number, row in enumerate(records.rows, 1):
            try:
                for part in self._parts(row):
                    found.append(self._example({**part, "folder": records.folder}))
            except DataError as error:
                raise DataError(f"{records.name} example {number}: {error}") from None
        longest = max((len(e.input_ids) for e in found), default=0)
        kept = [e for e in found if e.supervised and (max_length is None or len(e.input_ids) <= max_length)]
        if not kept:
            raise DataError(
                f"{records.name}: none of the {len(found)} examples is left at max_length={max_length}; the longest "
                f"has {longest} tokens, those of its images among them"
            )
        supervised = sum(e.supervised for e in kept)
        if len(kept) < len(found):
            logger.warning(
                "%s: %d of %d examples with images are left out, as they are longer than max_length=%s; the longest "
                "has %d tokens", records.name, len(found) - len(kept), len(found), max_length, longest,
            )  # fmt: skip
        return Tokenized(
            kept,
            tokens=sum(len(e.input_ids) for e in kept),
            supervised=supervised,
            lost=sum(e.supervised for e in found) - supervised,
            cut=0,
            dropped=len(found) - len(kept),
        )

    def batch(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return what the model takes of `SeenExample`s: ids, labels and mask, (examples, longest), and pixels."""
        return self.collate([example.row for example in examples])

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return what the model takes of prompts that it is to answer: ids and mask, (prompts, longest), and pixels.

        Args:
            rows: Each with a prompt, text or messages; images, all with some or all without; and the folder of paths.

        Raises:
            DataError: An image or a prompt that cannot be used.
        """
        from trl import apply_chat_template, prepare_multimodal_messages

        texts = []
        images = [[open_image(image, row["folder"]) for image in row["images"]] for row in rows]
        for row, opened in zip(rows, images, strict=True):
            if self._suffixes or isinstance(row["prompt"], str):
                texts.append(_said(row["prompt"]))
                continue
            messages = _placed(row["prompt"], len(opened))
            with _blamed(what="the chat template"):
                prompt = prepare_multimodal_messages(messages, images=opened)
                texts.append(apply_chat_template({"prompt": prompt}, self.processor)["prompt"])
        # with no token in front of a text, as in training
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
        with _blamed(a_text=any(isinstance(row["prompt"], str) for row in rows)):
            made = self.processor(images=images if any(images) else None, text=texts, **options)
        return {name: tensor for name, tensor in self._tensors(made).items() if name != "labels"}

    def _parts(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        messages, images = row.get("messages"), row.get("images", [])
        if messages is not None:
            messages = _placed(messages, len(images))
        if messages is None or not self.completion_only:
            turns = {key: row[key] for key in ("prompt", "completion") if key in row}
            yield (turns if messages is None else {"messages": messages}) | {"images": images}
            return
        placed = any(map(_places, messages))
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i:
                before = messages[:i]
                seen = sum(map(_places, before)) if placed else len(images)
                yield {"prompt": before, "completion": [message], "images": images[:seen]}

    def _example(self, row: Mapping[str, Any]) -> SeenExample:
        made = self.collate([row])
        ids, labels = (made[key][0].numpy().astype(np.int32) for key in ("input_ids", "labels"))
        return SeenExample(ids, labels, row)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return what the model takes of rows: messages, or a prompt and a completion; images; and a folder for paths.

        Raises:
            DataError: An image or a text that cannot be used.
        """
        opened = []
        for row in rows:
            images = [open_image(image, row["folder"]) for image in row["images"]]
            opened.append({key: value for key, value in row.items() if key != "folder"} | {"images": images})
        if self._suffixes:
            return self._suffixed(opened)
        with _blamed():
            made = self._tensors(self._collate([dict(row) for row in opened]))
            if (seen := made.get(_SEEN)) is not None and seen.shape[1] < made["input_ids"].shape[1]:
                alone = [seen[0]] if len(opened) == 1 else [self._collate([row])[_SEEN][0] for row in opened]
                made[_SEEN] = _seen_by_all(alone, made["attention_mask"], seen)
        return made

    def _suffixed(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [(_said(row["prompt"]), _said(row["completion"])) for row in rows if "completion" in row]
        if len(pairs) < len(rows):
            raise DataError("the model's processor takes prompts and completions, and trains on completions alone")
        eos = str(self.processor.tokenizer.eos_token)
        with _blamed():
            made = self._tensors(self.processor(
                images=[row["images"] for row in rows], text=[prompt for prompt, _ in pairs],
                suffix=[answer.removesuffix(eos) for _, answer in pairs], padding=True, padding_side="right",
                return_tensors="pt",
            ))  # fmt: skip
        outside = made["token_type_ids" if self.completion_only else "attention_mask"] == 0
        return {**made, "labels": made["input_ids"].masked_fill(outside, IGNORED)}

    def _tensors(self, made: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {
            key: value.to(self.dtype if value.is_floating_point() else value.dtype).contiguous()
            for key, value in made.items()
            if isinstance(value, torch.Tensor)
        }


@contextmanager
def _blamed(what: str = "the model's processor", *, a_text: bool = False) -> Iterator[None]:
    """Say in a line what a processor or a template fails with, which may be anything."""
    try:
        yield
    except Exception as error:
        told = f"{what} cannot take it ({type(error).__name__}: {first_line(error)})"
        hint = "; a prompt that is no chat needs the model's own token where an image is to be" if a_text else ""
        raise DataError(told + hint) from None


def _seen_by_all(prompts: Sequence[torch.Tensor], mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return which tiles each token sees, (rows, tokens, images, tiles): an answer sees what the prompt's end does.

    Args:
        prompts: What those of each prompt see, (tokens, images, tiles).
        mask: Of all tokens, (rows, tokens), filled up on the right.
        like: What TRL's collator makes of it, of the prompts alone.
    """
    made = like.new_zeros(*mask.shape, *like.shape[2:])
    for row, seen, length in zip(made, prompts, mask.sum(1).tolist(), strict=True):
        images = seen.shape[1]
        row[: len(seen), :images] = seen
        row[len(seen) : length, :images] = seen[-1]
    return made


def _said(turn: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a prompt or a completion, which may be a message."""
    if isinstance(turn, str):
        return turn
    if len(turn) > 1 or not (text := text_of(turn[0].get("content"))):
        raise DataError("the model's processor takes a question and its answer as texts, no longer chats")
    return text


def _placed(messages: Sequence[Mapping[str, Any]], images: int) -> Sequence[Mapping[str, Any]]:
    """Return messages with all or none of the texts in parts; where none are, images come before the user's first.

    Raises:
        DataError: There are places for another number of images.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages
    if (places := sum(map(_places, messages))) != images:
        raise DataError(f"its messages have places for {places} images, and there are {images}")
    return in_parts(messages)


def _places(message: Mapping[str, Any]) -> int:
    """Return how many images a message has places for."""
    content = message.get("content")
    return sum(part["type"] == "image" for part in content) if isinstance(content, list) else 0

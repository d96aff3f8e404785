"""Examples with images: read, counted, batched."""

from __future__ import annotations

import base64
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from seeing import make_seeing, squares
from tiny import TEXT_VOCAB, make_tokenizer, write_jsonl
from transformers import MllamaImageProcessorPil, MllamaProcessor, PaliGemmaProcessor, SiglipImageProcessorPil

from qosora.base import load_processor
from qosora.data import Records, Seer, load_records
from qosora.data.vision import open_image
from qosora.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_seeing(folder / "llava")
    write_jsonl(folder / "data.jsonl", squares(folder / "pictures", 6))
    return folder


@pytest.fixture(scope="module")
def seer(place: Path) -> Seer:
    return Seer(load_processor(place / "llava"))


def records(place: Path, *rows: dict[str, Any]) -> Records:
    return load_records(write_jsonl(place / "rows.jsonl", rows))


def encoded(path: Path) -> bytes:
    made = io.BytesIO()
    with Image.open(path) as image:
        image.save(made, "PNG")
    return made.getvalue()


def test_answers_are_trained_on_and_images_have_their_tokens(place: Path, seer: Seer):
    found = seer.tokenize(load_records(place / "data.jsonl"))
    assert len(found) == 6
    assert found.supervised == sum(len(name) + 1 for name in ("red", "green", "blue") * 2)
    for example in found.examples:
        assert (example.input_ids == TEXT_VOCAB).sum() == 4
        trained = example.input_ids[example.labels != -100]
        assert np.array_equal(trained, example.labels[example.labels != -100])
        assert trained[-1] == 257


def test_a_batch_has_the_tokens_of_its_examples_and_their_pixels(place: Path, seer: Seer):
    found = seer.tokenize(load_records(place / "data.jsonl")).examples
    batch = seer.batch(found[:3])
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert batch["pixel_values"].dtype == torch.float32
    for row, labels, example in zip(batch["input_ids"], batch["labels"], found, strict=False):
        length = len(example.input_ids)
        assert row[:length].tolist() == example.input_ids.tolist()
        assert labels[:length].tolist() == example.labels.tolist()
        assert (labels[length:] == -100).all()
    red, green, _ = batch["pixel_values"].mean((2, 3))
    assert red.argmax() == 0
    assert green.argmax() == 1


def test_pixels_are_of_the_dtype_that_the_model_computes_in(place: Path):
    seer = Seer(load_processor(place / "llava"), dtype=torch.bfloat16)
    batch = seer.batch(seer.tokenize(load_records(place / "data.jsonl", limit=1)).examples)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.int64


def test_each_turn_of_the_assistant_is_an_example(place: Path, seer: Seer):
    picture = "pictures/0.png"
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
    ]
    found = seer.tokenize(records(place, {"messages": chat, "images": [picture, "pictures/1.png"]}))
    assert [int((e.input_ids == TEXT_VOCAB).sum()) for e in found.examples] == [4, 8]
    assert [e.labels[e.labels != -100].tolist() for e in found.examples] == [
        [ids, 257] for ids in (found.examples[0].input_ids[-2], found.examples[1].input_ids[-2])
    ]
    whole = Seer(seer.processor, completion_only=False).tokenize(
        records(place, {"messages": chat, "images": [picture, "pictures/1.png"]})
    )
    assert len(whole) == 1
    assert (whole.examples[0].labels != -100).all()


def test_prompts_are_as_in_training(place: Path, seer: Seer):
    rows = load_records(place / "data.jsonl").rows[:3]
    examples = seer.tokenize(load_records(place / "data.jsonl", limit=3)).examples
    asked = [{"prompt": row["messages"][:1], "images": row["images"], "folder": place} for row in rows]
    asked[1]["prompt"] = [{"role": "system", "content": "Be brief."}, *asked[1]["prompt"]]
    made = seer.prompts(asked)
    assert torch.equal(made["pixel_values"], seer.batch(examples)["pixel_values"])
    for ids, mask, example in zip(made["input_ids"], made["attention_mask"], examples, strict=True):
        before = example.input_ids[example.labels == -100].tolist()
        assert mask.sum() == len(before) or "Be brief." in seer.processor.tokenizer.decode(ids)
        assert ids[mask.bool()].tolist()[-len(before) + 1 :] == before[1:]
        assert not mask[: -int(mask.sum())].any()


def test_a_turn_may_be_text_where_another_has_an_image(place: Path, seer: Seer):
    chat = [
        {"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "colour?"}]},
        {"role": "assistant", "content": "red"},
    ]  # fmt: skip
    found = seer.tokenize(records(place, {"messages": chat, "images": ["pictures/0.png"]})).examples
    assert [int((e.input_ids == TEXT_VOCAB).sum()) for e in found] == [0, 4]
    assert "first" in seer.processor.tokenizer.decode(found[1].input_ids)


def test_a_prompt_that_cannot_be_seen_is_told(place: Path, seer: Seer):
    row = {"images": ["pictures/0.png"], "folder": place}
    with pytest.raises(DataError, match="a prompt that is no chat needs the model's own token where an image is"):
        seer.prompts([{"prompt": "colour?", **row}])
    with pytest.raises(DataError, match="places for 0 images, and there are 1"):
        seer.prompts([{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], **row}])
    with pytest.raises(DataError, match="the chat template cannot take it"):
        seer.prompts([{"prompt": [{"role": "nobody", "content": "a"}], **row}])


def test_prompts_and_completions(place: Path, seer: Seer):
    row = {"prompt": "<s><image>colour?", "completion": "red</s>", "image": "pictures/0.png"}
    (example,) = seer.tokenize(records(place, row)).examples
    assert (example.input_ids == TEXT_VOCAB).sum() == 4
    assert (example.labels != -100).sum() == 4


def test_an_answer_sees_the_tiles_that_its_prompt_does(place: Path):
    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>", "<|python_tag|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    pixels = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=2)
    seer = Seer(MllamaProcessor(image_processor=pixels, tokenizer=tokenizer))
    rows = [
        {"prompt": "<|image|>colour?", "completion": "red", "images": ["pictures/0.png"]},
        {"prompt": "a<|image|>b<|image|>colours, then?", "completion": "no", "images": ["pictures/1.png"] * 2},
    ]
    examples = seer.tokenize(records(place, *rows)).examples
    batch = seer.batch(examples)
    seen, mask = batch["cross_attention_mask"], batch["attention_mask"]
    assert seen.shape == (*mask.shape, 2, 2)
    assert seen[0, : mask[0].sum(), 0, 0].all()  # from the image on, which is first
    assert not seen[0, :, 1].any()
    assert not seen[0, mask[0].sum() :].any()
    first, second = (batch["input_ids"][1] == 258).nonzero()[:, 0].tolist()
    length = int(mask[1].sum())
    assert seen[1, first:second, 0, 0].all()
    assert seen[1, second:length, 1, 0].all()
    assert seen[1, :, :, 0].sum() == length - first
    alone = seer.batch(examples[1:])["cross_attention_mask"]
    assert torch.equal(alone, seen[1:])


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of transformers' own processor
def test_answers_as_suffixes(place: Path):
    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.eos_token
    pixels = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pixels.image_seq_length = 4
    seer = Seer(PaliGemmaProcessor(image_processor=pixels, tokenizer=tokenizer))
    chats = load_records(place / "data.jsonl", limit=2)
    texts = records(place, *[
        {"prompt": "colour?", "completion": row["messages"][1]["content"] + end, "images": row["images"]}
        for row, end in zip(chats.rows, ("", "</s>"), strict=True)
    ])  # fmt: skip
    found = seer.tokenize(chats).examples
    for example, other, name in zip(found, seer.tokenize(texts).examples, ("red", "green"), strict=True):
        assert example.input_ids.tolist() == other.input_ids.tolist()
        assert tokenizer.decode(example.labels[example.labels != -100]) == f"{name}</s>"
    batch = seer.batch(found)
    assert (batch["labels"][0] != -100).sum() == 4
    assert batch["input_ids"][0, -2:].tolist() == [257, 257]  # filled up on the right
    assert batch["token_type_ids"].equal((batch["labels"] != -100).long())
    asked = seer.prompts([{"prompt": "colour?", "images": chats.rows[0]["images"], "folder": place}])
    assert asked["input_ids"][0].tolist() == found[0].input_ids[found[0].labels == -100].tolist()
    assert "labels" not in asked
    longer = {"messages": [*chats.rows[0]["messages"], *chats.rows[0]["messages"]], "images": chats.rows[0]["images"]}
    with pytest.raises(DataError, match="takes a question and its answer as texts, no longer chats"):
        seer.tokenize(records(place, longer))


@pytest.mark.parametrize("kind", ["path", "uri", "bytes", "pil", "parquet"])
def test_an_image_is_the_same_however_it_comes(place: Path, tmp_path: Path, kind: str):
    path = place / "pictures" / "1.png"
    image: Any = {
        "path": "pictures/1.png", "uri": f"data:image/png;base64,{base64.b64encode(encoded(path)).decode()}",
        "bytes": {"bytes": encoded(path), "path": None}, "pil": Image.open(io.BytesIO(encoded(path))), "parquet": None,
    }[kind]  # fmt: skip
    if kind == "parquet":
        rows = [{"prompt": "a", "completion": "b", "images": [{"bytes": encoded(path), "path": "x.png"}]}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
        image = load_records(tmp_path / "data.parquet").rows[0]["images"][0]
    assert np.array_equal(np.asarray(open_image(image, place)), np.asarray(open_image(str(path), place)))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("none.png", "none.png: no such image"),
        ("data.jsonl", "data.jsonl is no image that can be read"),
        ("https://example.com/a.png", "is an address, from which nothing is fetched"),
        ("data:image/png;base64,????", "is no image that can be read"),
        (5, "an image must be a path or bytes, got int"),
        ({"bytes": b"no"}, "bytes is no image that can be read"),
        ({}, "an image must be a path or bytes"),
        ("", "an image must be a path or bytes"),
    ],
)
def test_what_is_no_image_is_told(place: Path, image: Any, words: str):
    with pytest.raises(DataError, match=words):
        open_image(image, place)


def test_a_picture_that_would_fill_the_memory_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="is no image that can be read"):
        open_image("pictures/1.png", place)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": ["pictures/0.png", "pictures/1.png", "none.png"]}, "example 2: .*none.png: no such image"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                       {"role": "assistant", "content": "b"}]}, "example 2: its messages have places for 0 images"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_with_its_example(place: Path, seer: Seer, change: dict[str, Any], words: str):
    rows = squares(place / "pictures", 2)
    with pytest.raises(DataError, match=words):
        seer.tokenize(records(place, rows[0], {**rows[1], **change}))


def test_long_examples_are_left_out_not_cut(place: Path, seer: Seer, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "qosora"):
        found = seer.tokenize(load_records(place / "data.jsonl"), max_length=35)
    assert 0 < len(found) < 6
    assert found.dropped == 6 - len(found)
    assert "are left out, as they are longer than max_length=35; the longest has 36" in caplog.text
    with pytest.raises(DataError, match="none of the 6 examples is left at max_length=9"):
        seer.tokenize(load_records(place / "data.jsonl"), max_length=9)


def test_a_message_of_something_else_is_refused(place: Path):
    chat = [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="has no text as content in message 1"):
        records(place, {"messages": chat, "images": ["pictures/0.png"]})


def test_a_model_without_a_processor(place: Path, tmp_path: Path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((place / "llava" / name).read_bytes())
    with pytest.raises(CheckpointError, match="no processor of images there"):
        load_processor(tmp_path)

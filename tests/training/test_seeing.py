"""Models that see are trained on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from seeing import COLOURS, make_seeing, squares
from tiny import make_checkpoint, write_jsonl
from transformers import AutoProcessor, LlavaForConditionalGeneration

from qosora import evaluate, export_merged, load_model, load_tokenizer
from qosora.base import quantize
from qosora.config import QosoraConfig
from qosora.errors import ConfigError, DataError
from qosora.inference import Chat
from qosora.training import TrainConfig, preview_run, train
from qosora.training.answers import answers_of

LEARNING = {
    "batch_size": 8, "max_steps": 120, "learning_rate": 3e-2, "modules_to_save_learning_rate": 1e-2,
    "modules_to_save": ["multi_modal_projector", "lm_head"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    storage = QosoraConfig(rank=16, modules_to_not_convert=["multi_modal_projector"])
    quantize(make_seeing(folder / "llava"), folder / "base", storage)
    quantize(make_checkpoint(folder / "llama", "llama-text"), folder / "blind", QosoraConfig(rank=8))
    write_jsonl(folder / "train.jsonl", squares(folder / "pictures", 48))
    write_jsonl(folder / "test.jsonl", squares(folder / "others", 9))
    return folder


def config(place: Path, output: Path, **options: Any) -> TrainConfig:
    data = {"data": str(place / "train.jsonl"), "eval_data": str(place / "test.jsonl"), "progress": False}
    return TrainConfig(**{"model": str(place / "base"), **data, "output_dir": str(output), **options})


@pytest.mark.slow
def test_it_learns_the_colours_of_squares_and_says_them_without_qosora(place: Path, tmp_path: Path):
    result = train(config(place, tmp_path / "run", **LEARNING))
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < 0.05
    assert result.supervised_tokens == 240

    model, tokenizer = load_model(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    found = evaluate(model, tokenizer, place / "test.jsonl", exact_match=True)
    assert found.loss == pytest.approx(result.eval_loss_after, rel=1e-3)
    assert found.tokens == 45
    assert found.exact_match == 1
    assert [sample.generated for sample in found.samples[:3]] == list(COLOURS)

    written = answers_of(tmp_path / "run", 3)
    assert [(answer.prompt, answer.expected, answer.after) for answer in written] == [
        ("colour?", name, name) for name in COLOURS
    ]
    chat = Chat(model, tokenizer, name="run")
    for i, name in enumerate(COLOURS):
        chat.show(place / "others" / f"{i}.png")
        assert chat.compare("colour?")["run"] == name
        assert chat.answer("colour?") == name
        chat.begin()

    export_merged(place / "base", tmp_path / "merged", tmp_path / "run", verify=True)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    for name, colour in COLOURS.items():
        square = Image.new("RGB", (50, 50), tuple(value - 5 for value in colour))
        content = [{"type": "image", "image": square}, {"type": "text", "text": "colour?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        written = plain.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == name


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(place: Path, tmp_path: Path):
    options = {"max_steps": 6, "save_steps": 3, "save_total_limit": None, "eval_data": None}
    train(config(place, tmp_path / "whole", **options))
    train(config(place, tmp_path / "parts", **options))
    import shutil

    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    (tmp_path / "parts" / "result.json").unlink()
    assert train(config(place, tmp_path / "parts", **options, resume=True)).resumed_from == 3
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_accumulated_batches_are_one(place: Path, tmp_path: Path):
    found = {}
    for size, times in ((4, 1), (2, 2)):
        options = {"batch_size": size, "gradient_accumulation": times, "max_steps": 2, "eval_data": None}
        train(config(place, tmp_path / str(size), **options))
        found[size] = load_file(tmp_path / str(size) / "adapter_model.safetensors")
    for name, tensor in found[4].items():
        assert torch.allclose(tensor, found[2][name], rtol=1e-4, atol=1e-5), name


def test_the_adapter_has_the_processor(place: Path, tmp_path: Path):
    train(config(place, tmp_path / "run", max_steps=1, eval_data=None))
    assert (tmp_path / "run" / "processor_config.json").is_file()
    again = train(config(place, tmp_path / "more", model=str(tmp_path / "run"), max_steps=1, eval_data=None))
    assert again.steps == 1


def test_what_is_shown_before(place: Path, tmp_path: Path):
    found = preview_run(config(place, tmp_path / "run"))
    text = "".join(token for token, _ in found.shown[0])
    assert text.count("<image>") == 4
    assert "".join(token for token, trained in found.shown[0] if trained) == "red</s>"


def test_a_model_that_takes_no_images_says_so(place: Path, tmp_path: Path):
    with pytest.raises(DataError, match="has images, and the model takes none"):
        preview_run(config(place, tmp_path / "run", model=str(place / "blind")))
    model, tokenizer = load_model(place / "blind"), load_tokenizer(place / "blind")
    with pytest.raises(DataError, match="has images, and the model takes none"):
        evaluate(model, tokenizer, place / "test.jsonl")


def test_what_does_not_go_with_images(place: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="packing does not go with images"):
        preview_run(config(place, tmp_path / "run", packing=True))
    with pytest.raises(ConfigError, match="data with images take the whole base"):
        preview_run(config(place, tmp_path / "run", base_on="host"))
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}]
    wanted = config(place, tmp_path / "run", method="dpo", data=str(write_jsonl(tmp_path / "p.jsonl", pairs)))
    with pytest.raises(DataError, match="has images, which only method sft takes"):
        preview_run(TrainConfig(**{**wanted.to_dict(), "eval_data": None}))


def test_a_projector_in_4_bits_cannot_be_trained_in_full(place: Path, tmp_path: Path):
    quantize(place / "llava", tmp_path / "base", QosoraConfig(rank=8))
    wanted = config(place, tmp_path / "run", modules_to_save=["multi_modal_projector"], model=str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"modules_to_save names 'model.multi_modal_projector.linear_1', which is fr"):
        train(wanted)

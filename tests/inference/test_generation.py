"""Generation: batches give what single prompts give, and it stops where it should."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from seeing import make_seeing, squares
from tiny import make_checkpoint, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from qosora.base import load_tokenizer
from qosora.errors import CheckpointError, ConfigError, DataError
from qosora.inference.generation import generate, inference, stop_token_ids

PROMPTS = ["a", "hello world", "once upon a time", "x y"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-text", initializer_range=0.3)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_greedy_batches_equal_a_loop_without_padding_or_cache(model: Any):
    tokenizer = make_tokenizer()
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        written: list[int] = []
        while len(written) < 12:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
        expected.append(tokenizer.decode(written, skip_special_tokens=True))
    for batch_size in (1, 3):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected
    assert len(set(expected)) > 1
    assert tokenizer.pad_token is None


def test_it_stops_at_any_stop_token(model: Any):
    tokenizer = make_tokenizer()
    with torch.no_grad():
        first = int(model(torch.tensor([tokenizer("hello world")["input_ids"]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, first]
    try:
        assert stop_token_ids(model, tokenizer) == sorted([tokenizer.eos_token_id, first])
        assert generate(model, tokenizer, ["hello world"], max_new_tokens=8) == [""]
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id


def test_sampling_is_seeded_and_leaves_the_global_generator(model: Any):
    tokenizer = make_tokenizer()
    before = torch.get_rng_state()
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    first = generate(model, tokenizer, PROMPTS, seed=1, **options)
    assert first == generate(model, tokenizer, PROMPTS, seed=1, **options)
    assert first != generate(model, tokenizer, PROMPTS, seed=2, **options)
    assert torch.equal(before, torch.get_rng_state())


def test_chat_is_the_rendered_prompt(model: Any):
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "hello"}]
    by_hand = "<user>hello</s><assistant>"  # the tokenizer adds the beginning
    expected = generate(model, tokenizer, [by_hand], max_new_tokens=8)
    assert generate(model, tokenizer, ["hello"], max_new_tokens=8, chat=True) == expected
    assert generate(model, tokenizer, [messages], max_new_tokens=8) == expected
    with pytest.raises(DataError, match="no chat template"):
        generate(model, make_tokenizer(chat=False), [messages])


def test_what_is_refused(model: Any):
    with pytest.raises(DataError, match="prompt 2 is empty"):
        generate(model, make_tokenizer(), ["a", ""])
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(model, make_tokenizer(), ["a"], max_new_tokens=0)
    assert generate(model, make_tokenizer(), []) == []


def test_inference_gives_the_mode_back(model: Any):
    model.train()
    with inference(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert model.training
    model.eval()


def test_padding_and_tokens_that_the_model_does_not_have(model: Any):
    plain, added = make_tokenizer(), make_tokenizer()
    added.add_special_tokens({"pad_token": "[PAD]"})
    assert added.pad_token_id == len(model.get_input_embeddings().weight)
    expected = generate(model, plain, PROMPTS, max_new_tokens=5)
    assert generate(model, added, PROMPTS, max_new_tokens=5) == expected
    with pytest.raises(DataError, match="gives token 258, but the model's vocabulary has 258"):
        generate(model, added, ["a[PAD]"], max_new_tokens=5)


def test_answers_end_where_learned_positions_do(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    gpt2 = make_model("gpt2", vocab_size=258, n_positions=16).eval()
    logging.getLogger("qosora").propagate = True
    with caplog.at_level(logging.WARNING, "qosora"):
        generate(gpt2, make_tokenizer(), ["a", "abcdefg"], max_new_tokens=40)
    assert "answers end after 8 tokens, where the model's 16 positions do" in caplog.text
    with pytest.raises(DataError, match="a text has 17 tokens, but the model takes 16; shorten"):
        generate(gpt2, make_tokenizer(), ["abcdefghijklmno"], max_new_tokens=4)


def test_answers_are_told_as_they_come(model: Any):
    told: dict[int, str] = {}
    texts = generate(model, make_tokenizer(), PROMPTS, max_new_tokens=5, batch_size=1, written=told.__setitem__)
    assert told == dict(enumerate(texts))


@pytest.mark.parametrize("prompt", ["a\udcfc", [{"role": "user", "content": "a\ud83d"}]])
def test_a_prompt_that_is_no_text(model: Any, prompt: Any):
    with pytest.raises(DataError, match=r"prompt 2 has .*half of a character"):
        generate(model, make_tokenizer(), ["a", prompt])


def test_a_prompt_that_the_template_cannot_render(model: Any):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(DataError, match=r"prompt 1: the chat template cannot render it \(TypeError"):
        generate(model, tokenizer, ["a"], chat=True)


def test_options_that_transformers_takes_from_the_models_file_are_named_where_they_stop_it(model: Any):
    model.generation_config.output_hidden_states = {"x": 1}
    try:
        with pytest.raises(CheckpointError, match=r"generation_config.json: .* 'output_hidden_states': {'x': 1}"):
            generate(model, make_tokenizer(), ["a"], max_new_tokens=2)
    finally:
        model.generation_config.output_hidden_states = None


# ---- images ----


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    make_seeing(folder / "llava")
    squares(folder / "pictures", 3)
    return folder


def test_images_are_seen_in_batches_as_alone(seeing: Path):
    model, tokenizer = LlavaForConditionalGeneration.from_pretrained(seeing / "llava"), load_tokenizer(seeing / "llava")
    prompts = ["colour?", "what is it, then?", "a", "colour?"]
    images = [["0.png"], ["1.png", "2.png"], [], ["2.png"]]
    options: dict[str, Any] = {"max_new_tokens": 8, "chat": True, "folder": seeing / "pictures"}
    alone = [
        generate(model, tokenizer, [prompt], images=[of_it], **options)[0]
        for prompt, of_it in zip(prompts, images, strict=True)
    ]
    for batch_size in (2, 4):
        assert generate(model, tokenizer, prompts, images=images, batch_size=batch_size, **options) == alone
    assert alone[0] != alone[3]

    processor = AutoProcessor.from_pretrained(seeing / "llava")
    content = [{"type": "image", "path": str(seeing / "pictures" / "0.png")}, {"type": "text", "text": "colour?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert alone[0] == tokenizer.decode(written, skip_special_tokens=True)


def test_an_image_that_cannot_be_seen_is_told(seeing: Path, model: Any):
    with pytest.raises(DataError, match="have images, and the model takes none"):
        generate(model, make_tokenizer(), ["a"], images=[["0.png"]])
    sees, tokenizer = LlavaForConditionalGeneration.from_pretrained(seeing / "llava"), load_tokenizer(seeing / "llava")
    with pytest.raises(DataError, match=r"prompts 1, 2: .*none\.png: no such image"):
        generate(sees, tokenizer, ["a", "b"], images=[["none.png"]] * 2, chat=True)
    with pytest.raises(ConfigError, match="images must be given for each of the 2 prompts, got 1"):
        generate(sees, tokenizer, ["a", "b"], images=[["none.png"]])

"""The demo's shipped model and data: they load, fit the package, and hold what the demo relies on."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_TOTAL_BYTES = 4 * 2**20
MODEL_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def assets() -> Path:
    return Path(str(resources.files("qosora"))) / "demo" / "assets"


@pytest.fixture(scope="module")
def tokenizer(assets: Path):
    return AutoTokenizer.from_pretrained(assets / "model")


@pytest.fixture(scope="module")
def model(assets: Path):
    return AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits(assets: Path) -> dict[str, list[dict[str, str]]]:
    return {name: read_rows(assets / f"{name}.jsonl") for name in ("train", "test")}


def test_assets_are_all_there_and_small(assets: Path) -> None:
    missing = MODEL_FILES - {path.name for path in (assets / "model").iterdir()}
    assert not missing
    total_bytes = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file())
    assert total_bytes < MAX_TOTAL_BYTES, f"the assets take {total_bytes:,} bytes"


def test_every_linear_of_the_layers_is_at_least_64_wide(model) -> None:
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linears) == 7 * model.config.num_hidden_layers
    narrow = {name: tuple(m.weight.shape) for name, m in linears.items() if min(m.weight.shape) < 64}
    assert not narrow


def test_special_tokens_agree(model, tokenizer) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected = getattr(tokenizer, key)
        assert expected is not None
        assert getattr(model.config, key) == expected
        assert getattr(model.generation_config, key) == expected
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) == model.config.vocab_size


def test_chat_template_renders_a_turn(tokenizer) -> None:
    turns = [{"role": "user", "content": "Where is Mia?"}, {"role": "assistant", "content": "Mia is here."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == f"Question: Where is Mia?\nAnswer: Mia is here.{tokenizer.eos_token}"


def test_rows_are_complete_and_enough(splits: dict[str, list[dict[str, str]]]) -> None:
    assert 300 <= len(splits["train"]) <= 1500
    assert 100 <= len(splits["test"]) <= 200
    for rows in splits.values():
        assert all(set(row) == {"prompt", "completion"} for row in rows)
        assert all(row["prompt"].strip() and row["completion"].strip() for row in rows)


def test_no_test_prompt_is_trained_on(splits: dict[str, list[dict[str, str]]]) -> None:
    prompts = {name: [row["prompt"] for row in rows] for name, rows in splits.items()}
    assert not set(prompts["train"]) & set(prompts["test"])
    assert all(len(set(texts)) == len(texts) for texts in prompts.values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompt_tokens_are_a_prefix_and_text_survives(splits, tokenizer, split: str) -> None:
    for row in splits[split]:
        text = row["prompt"] + row["completion"]
        prompt_ids, ids = tokenizer(row["prompt"])["input_ids"], tokenizer(text)["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids
        assert len(prompt_ids) < len(ids) < tokenizer.model_max_length
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_model_knows_its_pretraining_text(model, tokenizer) -> None:
    prompt = "Message: Good morning, Ana here. Please send four red cups to the mill. Thank you!\n"
    prompt += "Question: Where do the cups go?\nAnswer:"
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=7)
    assert tokenizer.decode(output[0, ids["input_ids"].shape[1] :]) == " The cups go to the mill."

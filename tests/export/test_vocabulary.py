"""Tokens that were added before training: what PEFT saves and loads, loading and exports take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import edit_tensors, refused
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import VOCAB, load, logits, make_checkpoint, sums, train, write_jsonl
from transformers import AutoModelForCausalLM

from qosora.base import load_model, quantize
from qosora.config import OsoraConfig, QosoraConfig
from qosora.export import export_lora, export_merged
from qosora.training import train as train_run
from qosora.training.config import TrainConfig

NEW = torch.tensor([[1, 2, VOCAB, VOCAB + 4, 3]])
SAVED: list[list[str] | None] = [None, ["embed_tokens"], ["embed_tokens", "lm_head"]]


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


@torch.no_grad()
def of_new_tokens(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(NEW).logits
    return found


def made(folder: Path, family: str, saved: list[str] | None, added: int = 5) -> Any:
    """Write `original`, `base` and `adapter`, trained with more tokens than the base has; return the model."""
    quantize(make_checkpoint(folder / "original", family), folder / "base", QosoraConfig(rank=8))
    model = load(folder / "base")
    model.resize_token_embeddings(VOCAB + added)
    adapted = get_peft_model(model, OsoraConfig(modules_to_save=saved))
    if added > 0:
        train(adapted)
    adapted.save_pretrained(folder / "adapter")
    return adapted


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("saved", SAVED, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_loaded_and_exported(family: str, saved: list[str] | None, tmp_path: Path):
    model = made(tmp_path, family, saved)
    expected = of_new_tokens(model)
    assert expected.shape[-1] == VOCAB + 5
    loaded = load_model(tmp_path / "adapter", dtype=torch.float32)
    assert relative_difference(of_new_tokens(loaded), expected) < 1e-5
    export_merged(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter", dtype="float32", verify=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == VOCAB + 5
    assert relative_difference(of_new_tokens(merged), expected) < 1e-4
    refused(
        tmp_path, f"was trained with {VOCAB + 5} tokens, .* export merged weights", tmp_path / "base",
        tmp_path / "adapter", export=export_lora,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_fewer_tokens(tmp_path: Path):
    model = made(tmp_path, "llama", None, added=-10)
    export_merged(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter", dtype="float32", verify=True)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected, got = (
            m.eval()(ids).logits for m in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        )
    assert relative_difference(got, expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_embeddings_without_the_output_layer(tmp_path: Path):
    made(tmp_path, "llama", None)
    edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", lambda t: t.pop("base_model.model.lm_head.weight"))
    said = rf"brings embeddings of {VOCAB + 5} tokens, and lm_head.weight has shape \({VOCAB}, .* save_embedding_layers"
    refused(tmp_path, said, tmp_path / "base", tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_trained_on_keeps_them(tmp_path: Path):
    source = make_checkpoint(tmp_path / "original", "llama-text")
    quantize(source, tmp_path / "base", QosoraConfig(rank=8))
    model = load(tmp_path / "base")
    tokens = len(model.get_input_embeddings().weight) + 3
    model.resize_token_embeddings(tokens)
    perturbed = get_peft_model(model, OsoraConfig())
    perturbed.save_pretrained(tmp_path / "adapter")
    data = write_jsonl(tmp_path / "train.jsonl", sums(8))
    config = TrainConfig(
        model=str(tmp_path / "adapter"), data=str(data), output_dir=str(tmp_path / "more"), max_steps=2, save_steps=1,
        progress=False,
    )  # fmt: skip
    train_run(config)
    for folder in ("more", "more/checkpoint-1"):
        stored = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert len(stored["base_model.model.model.embed_tokens.weight"]) == tokens
    assert len(load_model(tmp_path / "more").get_input_embeddings().weight) == tokens


def test_a_vocabulary_that_stayed_is_loaded_as_ever(tmp_path: Path):
    quantize(make_checkpoint(tmp_path / "original", "llama"), tmp_path / "base", QosoraConfig(rank=8))
    model = get_peft_model(load(tmp_path / "base"), OsoraConfig(modules_to_save=["embed_tokens", "lm_head"]))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")), logits(model))
    export_merged(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter", dtype="float32", verify=True)

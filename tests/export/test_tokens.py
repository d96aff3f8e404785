"""Tokens whose embeddings were trained: by PEFT's own way, through every export, and with tokens that TRL adds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_base, make_checkpoint, make_tokenizer, perturbed
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from qosora.base.load import load_base, load_model
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import CheckpointError, ConfigError
from qosora.export.lora import export_lora
from qosora.export.merged import export_merged
from qosora.training.optimizer import create_optimizer, trainer_optimizer

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
TOKENS = [3, 7]
IDS = torch.tensor([[1, 3, 5, 7, 7, 2]])


@pytest.fixture(scope="module", params=["llama-text", "gemma3-text"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its base, and an adapter with two trained tokens; Gemma's head is its embeddings."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    make_base(folder / "base", make_checkpoint(folder / "source", request.param), QosoraConfig(rank=8))
    adapted = perturbed(load_base(folder / "base"), trainable_token_indices=TOKENS)
    adapted.save_pretrained(folder / "adapter")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_they_come_back_and_count(place: Path):
    adapted = perturbed(load_base(place / "base"), trainable_token_indices=TOKENS)
    assert torch.equal(logits(load_model(place / "adapter")), logits(adapted))
    without = perturbed(load_base(place / "base"))
    assert not torch.equal(logits(without), logits(adapted))


def test_merged_weights_have_them(place: Path, tmp_path: Path):
    report = export_merged(place / "base", tmp_path / "merged", place / "adapter", dtype="float32")
    assert report.replaced == ["model.embed_tokens.weight"]
    expected = logits(load_model(place / "adapter"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    onto: dict[str, Any] = {"onto": "original", "original": place / "source"}
    export_merged(place / "base", tmp_path / "onto", place / "adapter", dtype="float32", **onto)
    embeddings = load_file(tmp_path / "onto" / "model.safetensors")["model.embed_tokens.weight"]
    plain = load_file(place / "source" / "model.safetensors")["model.embed_tokens.weight"]
    changed = (embeddings != plain).any(1).nonzero().flatten().tolist()
    assert changed == TOKENS


def test_a_lora_brings_them(place: Path, tmp_path: Path):
    source = place / "source"
    export_lora(place / "base", tmp_path / "lora", place / "adapter", dtype="float32", original=source)
    onto: dict[str, Any] = {"onto": "original", "original": source}
    export_merged(place / "base", tmp_path / "onto", place / "adapter", dtype="float32", **onto)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "lora")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "onto"))
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-5)


def test_they_are_not_combined_with_other_adapters(place: Path, tmp_path: Path):
    perturbed(load_base(place / "base"), seed=4).save_pretrained(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"brings model\.embed_tokens, trained in full: only vectors are combined"
    ):
        export_merged(place / "base", tmp_path / "x", {place / "adapter": 0.5, tmp_path / "other": 0.5})


@pytest.mark.parametrize("named", [None, [999], [3]])
def test_a_config_that_does_not_fit_the_rows_is_told(place: Path, tmp_path: Path, named: list[int] | None):
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    shutil.copytree(place / "base", tmp_path / "base")
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    config["trainable_token_indices"] = named
    file.write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for known in adapter.glob("qosora_manifest.json"):
        known.unlink()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="trainable_tokens_delta has "):
        export_merged(tmp_path / "base", tmp_path / "x", adapter)
    assert not (tmp_path / "x").exists()


def test_only_these_rows_change_in_training(place: Path):
    model = get_peft_model(load_base(place / "base"), OsoraConfig(trainable_token_indices=TOKENS)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_optimizer(model, lr=1e-2, modules_to_save_lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("trainable_tokens_delta" in name for name in changed)
    assert all("osora_" in name or "trainable_tokens_delta" in name for name in changed)


def test_tokens_that_a_chat_template_adds(tmp_path: Path):
    """TRL resizes the embeddings, trains the new rows, and the output layer in full."""
    make_base(tmp_path / "base", make_checkpoint(tmp_path / "source", "llama-text"), QosoraConfig(rank=8))
    other, tokenizer = make_tokenizer(), make_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|new|>", "<|end|>"]})
    other.chat_template = "{% for m in messages %}<|new|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    other.save_pretrained(tmp_path / "template")
    tokenizer.pad_token = tokenizer.eos_token
    base = load_base(tmp_path / "base")
    rows = base.config.vocab_size
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    args = SFTConfig(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, save_strategy="no",
        chat_template_path=str(tmp_path / "template"), learning_rate=1e-2, **options,
    )  # fmt: skip
    chats = [{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}] * 4
    trainer = SFTTrainer(
        model=base, args=args, train_dataset=Dataset.from_list(chats), processing_class=tokenizer,
        peft_config=OsoraConfig(), optimizer_cls_and_kwargs=trainer_optimizer(args),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert base.config.vocab_size > rows
    ids = torch.tensor([[1, rows, rows + 1, 3]])
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        again = load_model(tmp_path / "adapter", base=tmp_path / "base")(ids).logits
        assert torch.equal(again, expected)
        export_merged(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter", dtype="float32")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("ids", [[], [-1], [1.5], "3", {"embed_tokens": []}, {"embed_tokens": "3"}])
def test_what_are_no_ids_is_told(ids: Any):
    with pytest.raises(ConfigError, match="trainable_token_indices must be ids of tokens, at least one, got "):
        OsoraConfig(trainable_token_indices=ids)


def test_rows_in_4_bits_are_not_trained(tmp_path: Path):
    base = make_base(tmp_path / "base", "llama-text", QosoraConfig(rank=8, embeddings="4bit"))
    with pytest.raises(ConfigError, match="is quantized, so none of its rows can be trained"):
        get_peft_model(load_base(base), OsoraConfig(trainable_token_indices=TOKENS))

"""A checkpoint with the head of another task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import SIZES, make_bert
from safetensors.torch import load_file
from tiny import make_checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qosora import load_base
from qosora.base import quantize
from qosora.checkpoints import read_manifest
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError

RANK_8 = QosoraConfig(rank=8)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "llama", "llama-text")


def test_all_but_the_head_is_as_in_the_base_of_the_model_itself(llama: Path, tmp_path: Path):
    quantize(llama, tmp_path / "plain", RANK_8)
    quantize(llama, tmp_path / "classifier", RANK_8, labels=["few", "some", "many"])
    plain, classifier = tensors(tmp_path / "plain"), tensors(tmp_path / "classifier")
    assert set(plain) - set(classifier) == {"lm_head.weight"}
    assert set(classifier) - set(plain) == {"score.weight"}
    assert all(torch.equal(tensor, plain[name]) for name, tensor in classifier.items() if name in plain)

    model = load_base(tmp_path / "classifier")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.id2label == {0: "few", 1: "some", 2: "many"}
    assert model.config.pad_token_id == 257  # the tokenizer has none, so its end of a text
    assert 0.01 < model.score.weight.std() < 0.04  # initializer_range 0.02
    assert read_manifest(tmp_path / "classifier")["made_with"]["labels"] == ["few", "some", "many"]
    assert (tmp_path / "classifier" / "tokenizer.json").exists()


def test_the_head_is_that_of_the_seed(llama: Path, tmp_path: Path):
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(llama, tmp_path / name, QosoraConfig(rank=8, seed=seed), task="reward")
        heads.append(tensors(tmp_path / name)["score.weight"])
    assert heads[0].shape == (1, 64)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def modernbert() -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**{**SIZES, **ids}))


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=96))


@pytest.mark.parametrize(
    ("make", "task", "drawn"),
    [
        (modernbert, "text-classification", ["classifier.bias", "classifier.weight"]),  # its first layer is there
        (t5, "text-classification", ["dense.bias", "dense.weight", "out_proj.bias", "out_proj.weight"]),
        (lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=5)), "token-classification",
         ["classifier.bias", "classifier.weight"]),
    ],
)  # fmt: skip
def test_what_the_source_has_is_kept(make: Any, task: str, drawn: list[str], tmp_path: Path):
    make().save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "base", RANK_8, task=task, labels=["a", "b", "c"])
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "base")
    new = [name for name in after if name.removeprefix("transformer.") not in before and ".weight_" not in name]
    stored = [name for name in new if name.endswith(("weight", "bias"))]
    assert [name.removeprefix("classification_head.") for name in sorted(stored) if "head" in name or "cl" in name] == [
        name for name in drawn if name.removeprefix("classification_head.") not in before
    ]
    model = load_base(tmp_path / "base")
    assert model.config.num_labels == 3
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("head."))


def test_a_masked_language_model_without_a_pooler_gets_one(tmp_path: Path):
    quantize(make_bert(tmp_path / "bert"), tmp_path / "base", RANK_8, labels=["a", "b"])
    names = set(tensors(tmp_path / "base"))
    assert {"bert.pooler.dense.s", "classifier.weight"} <= names
    assert not any(name.startswith("cls.") for name in names)


def test_a_tensor_that_both_models_need_is_missing_as_ever(tmp_path: Path):
    bert = make_bert(tmp_path / "bert")
    found = tensors(bert)
    del found["bert.encoder.layer.1.output.dense.weight"]
    from safetensors.torch import save_file

    save_file(found, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"needs are not in the\s+checkpoint, among them 'bert.encoder.layer.1"):
        quantize(bert, tmp_path / "base", RANK_8, labels=["a", "b"])


def test_another_set_of_labels_is_another_conversion(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(state: Any) -> None:
        if state.done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "base", RANK_8, labels=["a", "b"], progress=stop)
    with pytest.raises(ConfigError, match="labels"):
        quantize(llama, tmp_path / "base", RANK_8, labels=["a", "c"])
    quantize(llama, tmp_path / "base", RANK_8, labels=["a", "b"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "poetry"}, "task must be one of text-classification"),
        ({"task": "reward", "labels": ["a"]}, "leave out labels"),
        ({"task": "text-classification"}, "names of two classes or more"),
        ({"labels": ["a", "a"]}, "none twice"),
    ],
)
def test_wrong_tasks(llama: Path, tmp_path: Path, options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        quantize(llama, tmp_path / "base", RANK_8, **options)
    assert not (tmp_path / "base").exists()


def test_a_family_without_such_a_class(tmp_path: Path):
    MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=96)).save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no class for text-classification with a MambaConfig"):
        quantize(tmp_path / "m", tmp_path / "base", RANK_8, labels=["a", "b"])

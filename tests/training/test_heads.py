"""Classifiers and models of rewards: trained, their heads in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from classifiers import make_bert, places, temperatures
from peft import PeftModel
from tiny import make_checkpoint, sums, write_jsonl
from transformers import AutoModelForSequenceClassification

from qosora import cli, export_lora, export_merged, load_base, load_model, load_tokenizer
from qosora.adapter import OsoraLayer
from qosora.base import quantize
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError
from qosora.inference import evaluate_classes, evaluate_rewards
from qosora.training import TrainConfig, class_loss, preview_run, train
from qosora.training.checks import resolve_run
from qosora.training.processes import Processes
from qosora.training.run_folder import RunFolder

RANK_16 = QosoraConfig(rank=16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    llama, bert = make_checkpoint(folder / "llama", "llama-text"), make_bert(folder / "bert")
    quantize(llama, folder / "plain", RANK_16)
    quantize(llama, folder / "llama-texts", RANK_16, labels=["cold", "warm"])
    quantize(llama, folder / "rewards", RANK_16, task="reward")
    quantize(bert, folder / "bert-texts", RANK_16, labels=["cold", "warm"])
    quantize(bert, folder / "bert-words", RANK_16, task="token-classification", labels=["O", "B-LOC", "I-LOC"])
    write_jsonl(folder / "texts.jsonl", temperatures(64))
    write_jsonl(folder / "test_texts.jsonl", temperatures(24, seed=1))
    write_jsonl(folder / "words.jsonl", places(64))
    write_jsonl(folder / "test_words.jsonl", places(24, seed=1))
    write_jsonl(folder / "pairs.jsonl", pairs(48))
    write_jsonl(folder / "test_pairs.jsonl", pairs(16, 100))
    write_jsonl(folder / "sums.jsonl", sums(8))
    return folder


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " none"} for row in sums(count, start)]


def config(place: Path, output: Path, model: str, data: str, **options: Any) -> TrainConfig:
    defaults = {
        "method": "classify", "model": str(place / model), "data": str(place / f"{data}.jsonl"), "progress": False,
        "eval_data": str(place / f"test_{data}.jsonl"), "batch_size": 8, "max_steps": 40, "learning_rate": 3e-2,
        "modules_to_save_learning_rate": 1e-2,
    }  # fmt: skip
    return TrainConfig(**{**defaults, "output_dir": str(output), **options})


def test_a_new_head_learns_at_a_tenth_of_the_vectors_rate(place: Path, tmp_path: Path):
    chosen = config(place, tmp_path / "run", "llama-texts", "texts", modules_to_save_learning_rate=None)
    assert resolve_run(chosen, RunFolder(chosen), Processes()).modules_to_save_learning_rate == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("model", "data"), [("llama-texts", "texts"), ("bert-texts", "texts"), ("bert-words", "words")]
)
@pytest.mark.slow
def test_a_classifier_learns_and_leaves(place: Path, tmp_path: Path, model: str, data: str):
    result = train(config(place, tmp_path / "run", model, data))
    before, after = result.figures["eval_accuracy"]
    assert after > 0.95 > before
    assert result.figures["eval_f1"][1] > 0.9
    assert any("eval_accuracy" in line and "before and after" in line for line in result.summary())

    adapted, tokenizer = load_model(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    found = evaluate_classes(adapted, tokenizer, place / f"test_{data}.jsonl")
    assert found.accuracy == pytest.approx(after)
    assert found.loss == pytest.approx(result.eval_loss_after, rel=1e-5)

    export_merged(place / model, tmp_path / "merged", tmp_path / "run", verify=True)
    kind = type(adapted.get_base_model())
    plain = kind.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not [name for name, module in plain.named_modules() if type(module).__name__.startswith("Qosora")]
    ids = {"input_ids": torch.tensor([tokenizer("sun1")["input_ids"]])}
    with torch.no_grad():
        assert torch.allclose(plain(**ids).logits, adapted(**ids).logits, rtol=1e-3, atol=1e-4)
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["task_type"] == ("TOKEN_CLS" if data == "words" else "SEQ_CLS")


@pytest.mark.slow
def test_rewards_are_learned_and_leave_as_a_lora(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = train(config(place, tmp_path / "run", "rewards", "pairs", method="reward"))
    assert result.figures["eval_accuracy"][1] == 1.0
    assert result.figures["margin"][1] > result.figures["margin"][0]

    report = export_lora(place / "rewards", tmp_path / "lora", tmp_path / "run", verify=True)
    assert report.verification is not None
    adapted, tokenizer = load_model(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    found = evaluate_rewards(adapted, tokenizer, place / "test_pairs.jsonl", batch_size=5)
    assert (found.accuracy, found.pairs) == (1.0, 16)
    assert found.loss == pytest.approx(result.eval_loss_after, rel=1e-4)
    assert cli.main(["eval", str(tmp_path / "run"), "--data", str(place / "test_pairs.jsonl")]) == 0
    assert "accuracy  100.0%" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is no model of rewards"):
        evaluate_rewards(load_model(place / "plain"), tokenizer, place / "test_pairs.jsonl")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert 'LlamaForSequenceClassification.from_pretrained("llama", num_labels=1)' in card
    original = AutoModelForSequenceClassification.from_pretrained(place / "llama", num_labels=1, dtype=torch.float32)
    served = PeftModel.from_pretrained(original, tmp_path / "lora").eval()
    ids = {"input_ids": torch.tensor([tokenizer("3 + 6 = 9")["input_ids"]])}
    with torch.no_grad():
        difference = (served(**ids).logits - adapted(**ids).logits).abs().max()
    assert difference < 0.1  # quantization alone: the LoRA lies on the original's own weights


def test_the_head_is_trained_in_full_in_float32_and_all_else_in_vectors(place: Path, tmp_path: Path):
    train(config(place, tmp_path / "run", "bert-texts", "texts", max_steps=1, eval_data=None))
    model = load_model(tmp_path / "run")
    kept = {name for name, _ in model.named_parameters() if ".modules_to_save." in name}
    assert {name.rpartition("modules_to_save.")[2] for name in kept} == {"default.weight", "default.bias"}
    heads = [p for name, p in model.named_parameters() if name in kept]
    assert {p.dtype for p in heads} == {torch.float32}
    assert sum(isinstance(module, OsoraLayer) for module in model.modules()) == 2 * 6 + 1  # and the pooler


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_head_takes_what_comes_in_16_bits(place: Path, tmp_path: Path, precision: str):
    result = train(config(place, tmp_path / "run", "bert-texts", "texts", max_steps=2, precision=precision))
    assert result.train_loss == pytest.approx(0.69, abs=0.1)


def test_steps_that_are_accumulated_are_steps_of_the_whole_batch(place: Path, tmp_path: Path):
    """The last batch is smaller, and texts of words have different numbers of classes."""
    runs = {}
    for size, times in ((8, 1), (2, 4)):
        options = {"batch_size": size, "gradient_accumulation": times, "max_steps": 3, "learning_rate": 1e-2}
        train(config(place, tmp_path / str(size), "bert-words", "words", eval_data=None, **options))
        lines = (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()
        runs[size] = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert runs[2] == pytest.approx(runs[8], rel=1e-4)


def test_the_loss_is_the_mean_over_the_classes_there_are():
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([[0, -100, 3], [-100, -100, 1]])
    expected = F.cross_entropy(logits[labels != -100].float(), labels[labels != -100])
    assert torch.allclose(class_loss({"logits": logits}, labels), expected)
    assert torch.allclose(class_loss((logits,), labels, 6), expected / 2)
    none = class_loss((logits.requires_grad_(),), torch.full((2, 3), -100))
    none.backward()
    assert none == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_vectors(place: Path, tmp_path: Path):
    from safetensors.torch import load_file

    options = {"save_steps": 3, "max_steps": 6, "eval_data": None, "save_total_limit": None}
    train(config(place, tmp_path / "whole", "bert-texts", "texts", **options))
    train(config(place, tmp_path / "parts", "bert-texts", "texts", **options))
    for name in ("checkpoint-6", "adapter_model.safetensors", "adapter_config.json", "result.json"):
        path = tmp_path / "parts" / name
        if path.is_dir():
            import shutil

            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    again = train(config(place, tmp_path / "parts", "bert-texts", "texts", **options, resume=True))
    assert again.resumed_from == 3
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_what_is_shown_before(place: Path, tmp_path: Path):
    found = preview_run(config(place, tmp_path / "run", "bert-texts", "texts"))
    text = "".join(token for token, _ in found.shown[0])
    assert text.endswith(("-> warm", "-> cold"))
    assert [token for token, trained in found.shown[0] if trained] == [f" -> {text.rpartition(' ')[2]}"]
    assert (found.examples, found.supervised, found.steps) == (64, 64, 40)

    found = preview_run(config(place, tmp_path / "run", "bert-words", "words"))
    marked = [token for token, trained in found.shown[0] if trained]
    assert marked
    assert all(token.endswith(("/O", "/B-LOC", "/I-LOC")) for token in marked)


def test_pairs_that_are_too_long_are_left_out_and_told(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found = preview_run(
        config(place, tmp_path / "run", "rewards", "pairs", method="reward", max_length=15, eval_data=None)
    )
    assert 0 < found.examples < 48
    assert "longer than max_length=15" in caplog.text


@pytest.mark.parametrize(
    ("model", "method", "data", "error", "words"),
    [
        ("bert-texts", "sft", "sums", CheckpointError, "made for text-classification, which is trained with method cl"),
        ("rewards", "classify", "texts", CheckpointError, "made for reward, which is trained with method reward"),
        ("plain", "classify", "texts", CheckpointError, "no classifier, which method classify trains; make one"),
        ("plain", "reward", "pairs", CheckpointError, r"no model of rewards.*--task reward"),
    ],
)
def test_methods_have_their_models(
    place: Path, tmp_path: Path, model: str, method: str, data: str, error: type[Exception], words: str
):
    wanted = config(place, tmp_path / "run", model, data, method=method, eval_data=None)
    with pytest.raises(error, match=words):
        resolve_run(wanted, RunFolder(wanted), Processes())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": True}, "packing is for method sft"),
        ({"chat": True}, "chat is for method sft or dpo"),
        ({"method": "sft", "label_column": "x"}, "label_column is for method classify"),
        ({"reward": ["exact"]}, "reward is for method grpo"),
    ],
)
def test_options_of_other_methods(place: Path, tmp_path: Path, options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        config(place, tmp_path / "run", "bert-texts", "texts", **options)


def test_a_divided_base_is_refused(place: Path, tmp_path: Path):
    wanted = config(place, tmp_path / "run", "bert-texts", "texts", base_on="host")
    with pytest.raises(ConfigError, match="method classify takes the whole base on each GPU"):
        resolve_run(wanted, RunFolder(wanted), Processes())


def test_the_base_itself_is_as_it_was(place: Path):
    model = load_base(place / "bert-texts")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".osora" in name)

"""Loss, accuracy and F1 of classifiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from classifiers import make_bert, places, temperatures
from transformers import AutoTokenizer

from qosora import load_base, load_tokenizer
from qosora.base import quantize
from qosora.config import QosoraConfig
from qosora.data import load_records, tokenize_classes
from qosora.errors import CheckpointError
from qosora.inference import class_metrics, evaluate_classes, judge
from qosora.inference.classification import Judged

NAMES = ["O", "B-A", "I-A", "B-B", "I-B"]


def judged(there: str, said: str, names: list[str] = NAMES) -> Judged:
    return Judged(0.5, *([names.index(tag) for tag in tags.split()] for tags in (there, said)))


def test_accuracy_and_f1_by_hand():
    found = [judged("x", "x", ["x", "y", "z"]), judged("x", "y", ["x", "y", "z"]), judged("y", "y", ["x", "y", "z"])]
    measured = class_metrics(found, ["x", "y", "z"])
    # x: 1 right, said once, there twice: 2/3; y: 1 right, said twice, there once: 2/3; z does not occur
    assert measured == {"loss": 0.5, "accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("there", "said", "f1"),
    [
        ("B-A I-A O B-B", "B-A I-A O B-B", 1.0),
        ("B-A I-A O B-B", "B-A O O B-B", 0.5),  # a wrong end is a wrong entity
        ("B-A I-A", "B-B I-B", 0.0),
        ("B-A B-A", "B-A I-A", 0.0),  # two, and one
        ("O I-A I-A", "O B-A I-A", 1.0),  # an I that begins
        ("B-A I-B", "B-A B-B", 1.0),
        ("O O", "O O", 0.0),  # none to find, none found
        ("B-A O B-B O B-A", "B-A O B-A O O", 0.4),  # 1 right, 2 said, 3 there
    ],
)
def test_entities_count_whole(there: str, said: str, f1: float):
    assert class_metrics([judged(there, said)], NAMES)["f1"] == pytest.approx(f1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert") / "bert", initializer_range=0.2)


@pytest.mark.parametrize("kind", ["texts", "words"])
def test_it_is_what_the_model_says_of_each_example_alone(bert: Path, tmp_path: Path, kind: str):
    """Against a loop over single examples in float64, without padding."""
    if kind == "texts":
        labels, task, rows = ["cold", "warm"], "text-classification", temperatures(9)
    else:
        labels, task, rows = ["O", "B-LOC", "I-LOC"], "token-classification", places(9)
    quantize(bert, tmp_path / "base", QosoraConfig(rank=8), task=task, labels=labels)
    model, tokenizer = load_base(tmp_path / "base"), load_tokenizer(tmp_path / "base")
    result = evaluate_classes(model, tokenizer, rows, batch_size=4)

    exact = load_base(tmp_path / "base").dequantize().double()
    losses, right, count = 0.0, 0, 0
    form = "classes" if kind == "texts" else "tags"
    for example in tokenize_classes(load_records(rows, form=form), tokenizer, model.config.label2id).examples:
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor(example.input_ids[None], dtype=torch.int64)).logits[0]
        for scores, label in zip(logits.reshape(-1, len(labels)), example.labels.tolist(), strict=True):
            if label != -100:
                losses -= scores.log_softmax(-1)[label].item()
                right += int(scores.argmax()) == label
                count += 1
    assert result.labels == count
    assert result.examples == len(rows)
    assert result.loss == pytest.approx(losses / count, rel=1e-4)
    assert result.accuracy == pytest.approx(right / count)


def test_parts_of_the_batches_are_all_of_them(bert: Path, tmp_path: Path):
    quantize(bert, tmp_path / "base", QosoraConfig(rank=8), labels=["cold", "warm"])
    model, tokenizer = load_base(tmp_path / "base"), load_tokenizer(tmp_path / "base")
    examples = tokenize_classes(
        load_records(temperatures(9), form="classes"), tokenizer, model.config.label2id
    ).examples
    whole = judge(model, examples, 2)
    parts = [judge(model, examples, 2, part=part, parts=2) for part in range(2)]
    assert sorted(map(str, whole)) == sorted(map(str, parts[0] + parts[1]))
    assert len(parts[1]) == 4


def test_a_language_model_has_no_classes(bert: Path, tmp_path: Path):
    quantize(bert, tmp_path / "base", QosoraConfig(rank=8))
    with pytest.raises(CheckpointError, match="no classifier"):
        evaluate_classes(load_base(tmp_path / "base"), AutoTokenizer.from_pretrained(bert), temperatures(2))

"""A step is traced once, as long as nothing changes that it depends on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from qosora import remembered
from qosora.config import QosoraConfig
from qosora.memory.options import Batch, StepOptions
from qosora.memory.plan import plan
from qosora.memory.predict import TracedModel
from qosora.memory.traces import Traces

CONFIG: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
STORAGE, STEP = QosoraConfig(rank=8), StepOptions()


@pytest.fixture(autouse=True)
def no_memory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that were traced."""
    batches: list[Batch] = []
    predict = TracedModel.predict

    def recorded(self: TracedModel, batch: Batch) -> Any:
        batches.append(batch)
        return predict(self, batch)

    monkeypatch.setattr(TracedModel, "predict", recorded)
    return batches


def test_what_is_remembered_is_what_was_traced(traced: list[Batch]):
    batch = Batch(2, 64, padding=True)
    first = Traces(LlamaConfig(**CONFIG), STORAGE, STEP)
    found = first.predict(batch)
    assert found == TracedModel(LlamaConfig(**CONFIG), STORAGE, STEP).predict(batch)
    again = Traces(LlamaConfig(**CONFIG), STORAGE, STEP)
    traced.clear()
    assert again.predict(batch) == found
    names = ("trained_parameters", "paged_bytes", "attention", "layer_products", "largest_layer", "host_bytes")
    for name in names:
        assert getattr(again.facts, name) == getattr(first.facts, name) == getattr(first.model, name)
    assert not traced
    again.predict(replace(batch, size=3))
    assert traced == [replace(batch, size=3)]


def test_what_somebody_has_changed_is_traced_anew():
    batch = Batch(1, 64)
    found = Traces(LlamaConfig(**CONFIG), STORAGE, STEP).predict(batch)
    (file,) = (Path(os.environ["XDG_CACHE_HOME"]) / "qosora" / "plans").glob("*.json")
    kept = json.loads(file.read_text(encoding="utf-8"))
    (name,) = (key for key in kept if key.startswith("batch"))
    damages: list[Any] = [{"site": ["forward"]}, {"sites": 3}, {"another": 1}, []]
    for damaged in damages:
        made = kept | {name: {**kept[name], **damaged} if isinstance(damaged, dict) else damaged}
        file.write_text(json.dumps(made), encoding="utf-8")
        assert Traces(LlamaConfig(**CONFIG), STORAGE, STEP).predict(batch) == found


def test_a_plan_that_is_asked_for_again_is_the_same(traced: list[Batch]):
    options: dict[str, Any] = {"batch_size": 2, "seq_len": 128, "gpu_memory": "8GiB"}
    first = plan(LlamaConfig(**CONFIG), **options)
    assert traced
    traced.clear()
    assert plan(LlamaConfig(**CONFIG), **options).to_dict() == first.to_dict()
    assert not traced
    smaller = plan(LlamaConfig(**CONFIG), **{**options, "gpu_memory": "6GiB"})  # whatever the card's size
    assert smaller.usage == first.usage
    assert len(traced) <= 2  # the largest batch and the longest sequence are traced themselves


@pytest.mark.parametrize("changed", ["config", "storage", "options", "version", "code"])
def test_is_traced_anew_where_what_it_depends_on_changed(
    changed: str, traced: list[Batch], monkeypatch: pytest.MonkeyPatch
):
    Traces(LlamaConfig(**CONFIG), STORAGE, STEP).predict(Batch(1, 64))
    traced.clear()
    config, storage, step = LlamaConfig(**CONFIG), STORAGE, STEP
    if changed == "config":
        config = LlamaConfig(**{**CONFIG, "num_hidden_layers": 4})
    elif changed == "storage":
        storage = QosoraConfig(rank=4)
    elif changed == "options":
        step = StepOptions(gradient_checkpointing=False)
    elif changed == "version":
        monkeypatch.setattr(remembered, "version", lambda name: "0")
    else:
        monkeypatch.setattr(remembered, "_own_code", lambda: ["another"])
    Traces(config, storage, step).predict(Batch(1, 64))
    assert traced == [Batch(1, 64)]


def test_a_model_with_code_of_its_own_is_always_traced(traced: list[Batch], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LlamaConfig, "__module__", "transformers_modules.own")
    for _ in range(2):
        Traces(LlamaConfig(**CONFIG), STORAGE, STEP).predict(Batch(1, 64))
    assert len(traced) == 2


def test_only_so_many_models_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remembered, "_KEPT_FILES", 2)
    for i in range(4):
        remembered.remember(f"plans/{i}", {"fact": i})
    assert sum(bool(remembered.recall(f"plans/{i}")) for i in range(4)) == 2
    remembered.remember("places", {"a": 1})
    assert remembered.recall("places") == {"a": 1}

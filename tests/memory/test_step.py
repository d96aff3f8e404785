"""One training step: the trainer's own, and the batches that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import VOCAB, decompose, load, make_base, make_checkpoint, write_jsonl
from transformers import GenerationConfig

import qosora
from qosora.config import OsoraConfig, QosoraConfig
from qosora.layers.decoder import decoder_layers
from qosora.layers.tiling import Tiling
from qosora.memory.options import Batch, StepOptions
from qosora.memory.predict import TracedModel
from qosora.memory.profile import profile
from qosora.memory.step import prepare_model, register_model, register_optimizer, training_step
from qosora.memory.tracer import Tracer
from qosora.training import create_optimizer
from qosora.training.trainer import TRAINERS

#: Options of a run, and the sequences that an example makes.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "sft": ({}, 1),
    "dpo": ({}, 2),
    "kto": ({}, 1),
    "orpo": ({}, 2),
    "grpo": ({"reward": ["regex:b"], "max_completion_length": 21}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    base = make_base(
        tmp_path / "base",
        make_checkpoint(tmp_path / "llama", "llama-text", intermediate_size=512, vocab_size=16384),
        QosoraConfig(rank=16),
    )
    rows = [{"prompt": "a" * 20, "completion": "b" * 20} for _ in range(8)]
    data = str(write_jsonl(tmp_path / "data.jsonl", rows))
    pairs = [{"prompt": "a" * 20, "chosen": "b" * 20, "rejected": "c" * 20} for _ in range(8)]
    given = str(write_jsonl(tmp_path / "pairs.jsonl", pairs)) if method in ("dpo", "kto", "orpo") else data
    own, sequences = METHODS[method]
    peaks = []
    trainer = TRAINERS[method]
    step = trainer.training_step

    def traced(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = Tracer()
        backbone, layers = decoder_layers(self.model.get_base_model())
        with tracer, tracer.following(self.model, backbone, layers):
            register_optimizer(tracer, self.optimizer.optimizer)
            register_model(tracer, self.model)
            tensors = inputs.values() if isinstance(inputs, dict) else []
            tracer.register([t for t in tensors if isinstance(t, torch.Tensor)], "batch")
            tracer.enter_phase("forward")
            loss = step(self, model, inputs, *args, **kwargs)
        peaks.append({site.phase: 0 for site in tracer.sites})
        for site, peak in tracer.sites.items():
            peaks[-1][site.phase] = max(peaks[-1][site.phase], peak.total)
        return loss

    monkeypatch.setattr(trainer, "training_step", traced)
    for checkpointing in (True, False):
        options: dict[str, Any] = {"gradient_checkpointing": checkpointing}
        qosora.train(
            qosora.TrainConfig(
                model=str(base),
                data=given,
                output_dir=str(tmp_path / f"run-{checkpointing}"),
                method=method,
                batch_size=2,
                max_steps=3,
                save_steps=0,
                progress=False,
                **options,
                **own,
            )
        )
        options |= {"batch_size": 2 * sequences, "orpo": method == "orpo"}
        measured = profile(base, data=data, steps=1, padding=False, **options).live.phases
        if method == "sft":
            for phase in ("forward", "loss", "backward"):
                assert measured[phase] == pytest.approx(peaks[-1][phase], rel=0.005), phase
        assert max(measured.values()) == pytest.approx(max(peaks[-1].values()), rel=0.005)


@pytest.mark.parametrize("written", [12, 50])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_writing_answers_takes_what_is_planned(tmp_path: Path, name: str, written: int):
    """Of transformers' `generate` after a step, with more rows than a CPU keeps decoded weights for."""
    base = load(make_base(tmp_path / "base", name))
    batch = Batch(9, 60, written=written, rounds=2)
    planned = TracedModel(base.config, base.config.quantization_config, StepOptions(device="cpu", precision="fp32"))
    model = get_peft_model(base, OsoraConfig())
    prepare_model(model, gradient_checkpointing=True, tiling=Tiling.of(gradient_checkpointing=True))
    optimizer = create_optimizer(model, lr=1e-3)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=written, min_new_tokens=written, pad_token_id=0)
    backbone, layers = decoder_layers(base)
    tracer = Tracer()
    with tracer, tracer.following(model, backbone, layers):
        register_model(tracer, model)
        training_step(model, batch.tensors(VOCAB, "cpu"), optimizer, tracer)
        register_optimizer(tracer, optimizer)
        tracer.enter_phase("answers")
        ids = torch.randint(3, VOCAB, (18, 60 - written))
        model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    measured = max(peak.total for site, peak in tracer.sites.items() if site.phase == "answers")
    assert planned.predict(batch).phases["answers"] == pytest.approx(measured, rel=0.035)


def test_a_batch_is_rows_of_one_length():
    batch = Batch(3, 5)
    assert (batch.tokens, batch.columns) == (15, 5)
    made = batch.tensors(VOCAB, "cpu")
    assert {name: tuple(t.shape) for name, t in made.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (3, 5)
    )
    assert torch.equal(made["labels"], made["input_ids"])
    assert made["labels"].data_ptr() != made["input_ids"].data_ptr()
    assert 0 <= int(made["input_ids"].min()) <= int(made["input_ids"].max()) < VOCAB
    assert bool(made["attention_mask"].all())


def test_a_padded_batch_has_a_mask_that_hides_something():
    made = Batch(3, 5, padding=True).tensors(VOCAB, "cpu")
    assert int(made["attention_mask"].sum()) == 14
    assert made["labels"][made["attention_mask"] == 0].tolist() == [-100]


def test_a_packed_batch_is_one_row_of_several_examples_a_length():
    batch = Batch(2, 5, packing=True)
    assert (batch.tokens, batch.columns) == (10, 10)
    made = batch.tensors(VOCAB, "cpu")
    assert made["position_ids"].tolist() == [[0, 1, 2, 0, 1] * 2]
    assert made["input_ids"].shape == (1, 10)
    assert "attention_mask" not in made


def test_a_batch_on_meta_has_shapes_alone():
    for batch in (Batch(3, 5, padding=True), Batch(3, 5, packing=True)):
        there, here = batch.tensors(VOCAB, "meta"), batch.tensors(VOCAB, "cpu")
        assert {n: (t.shape, t.dtype) for n, t in there.items()} == {n: (t.shape, t.dtype) for n, t in here.items()}
        assert all(t.is_meta for t in there.values())


@pytest.mark.parametrize("loss", ["chunked", "whole", "orpo"])
def test_a_step_trains_and_tells_where_it_is(tmp_path: Path, loss: str):
    model = get_peft_model(decompose(make_checkpoint(tmp_path)), OsoraConfig())
    prepare_model(model, gradient_checkpointing=True, fused_head=loss == "chunked", tiling=Tiling.of())
    assert model.training
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer, tracer = torch.optim.SGD(trained, lr=0.1), Tracer()
    batch = Batch(2, 7, padding=True).tensors(VOCAB, "cpu")
    register_model(tracer, model)
    assert tracer.total >= sum(p.nbytes for p in model.parameters())
    with tracer:
        found = training_step(model, batch, optimizer, tracer, loss=loss)
    assert {site.phase for site in tracer.sites} >= {"forward", "loss", "optimizer"}
    assert float(found) > 0
    assert not found.requires_grad
    assert all(p.grad is None for p in trained)
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))

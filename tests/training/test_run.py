"""Training end to end on a tiny base: what changes, what is written, and that an interrupted run goes on unchanged."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_base, make_checkpoint, make_tokenizer, rounding, sums, write_jsonl
from training_runs import RUN, config, metrics, names_in
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaModel

import qosora.training.run
from qosora.base.load import load_model, load_tokenizer
from qosora.checkpoints import adapter_config
from qosora.config import QosoraConfig
from qosora.errors import ConfigError, FingerprintError, QosoraError
from qosora.inference.evaluation import evaluate
from qosora.inference.generation import generate
from qosora.layers.tiling import apply_tiling
from qosora.training.checks import resolve_run
from qosora.training.config import TrainConfig
from qosora.training.processes import Processes
from qosora.training.run import TrainResult, train
from qosora.training.run_folder import RunFolder

# ---- what a run leaves


def test_what_a_run_writes(place: Path, run: TrainResult):
    folder = place / "run"
    assert names_in(folder) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "checkpoint-4",
        "checkpoint-8", "checkpoint-10", "made_of.json", "metrics.jsonl", "qosora_manifest.json", "result.json",
        "tokenizer.json", "tokenizer_config.json", "train_config.yaml",
    }  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == run.to_dict()
    assert TrainConfig.load(folder / "train_config.yaml").output_dir == str(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}
    assert len(modes) == 1


def test_it_learns_and_the_adapter_loads(place: Path, run: TrainResult):
    folder = place / "run"
    evaluations = [line for line in metrics(folder) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 10]
    assert (run.eval_loss_before, run.eval_loss_after) == (evaluations[0]["eval_loss"], evaluations[1]["eval_loss"])
    assert run.eval_loss_after is not None
    assert run.eval_loss_before is not None
    assert run.eval_loss_after < run.eval_loss_before - 0.05
    tokenizer = load_tokenizer(folder)
    again = evaluate(load_model(folder), tokenizer, place / "test.jsonl")
    assert again.loss == pytest.approx(run.eval_loss_after, rel=rounding(torch.float32))
    base = evaluate(load_model(place / "base"), tokenizer, place / "test.jsonl")
    assert base.loss == pytest.approx(run.eval_loss_before, rel=rounding(torch.float32))


def test_summary(run: TrainResult):
    text = "\n".join(run.summary())
    assert f"trained {run.trained_parameters:,} parameters for 10 steps on 16 examples" in text
    assert f"evaluation loss {run.eval_loss_before:.4f} -> {run.eval_loss_after:.4f}" in text


@pytest.mark.parametrize(("base", "precision"), [("base", "fp32"), ("base", "bf16"), ("tied", "fp32")])
def test_only_the_vectors_change(place: Path, tmp_path: Path, base: str, precision: str):
    chosen = config(place, tmp_path / "run", model=str(place / base), precision=precision, learning_rate=1e-3)
    trainer, _ = qosora.training.run._trainer(resolve_run(chosen, RunFolder(chosen), Processes()))
    vectors = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(".osora_s." in name or ".osora_o." in name for name in vectors)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    before = {name: as_bytes(tensor) for name, tensor in trainer.model.state_dict().items()}
    RunFolder(chosen).begin(-1, {})
    trainer.train()
    assert {name for name, t in trainer.model.state_dict().items() if as_bytes(t) != before[name]} == vectors


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- interruption


KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(int(sys.argv[2]))  # as many as go on with it: sums depend on them
from qosora.training.config import TrainConfig
from qosora.training.run_folder import MetricsLog
from qosora.training import train
append = MetricsLog.append
def append_and_die(self, line):
    append(self, line)
    if line["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsLog.append = append_and_die
train(TrainConfig.load(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(place: Path, run: TrainResult, tmp_path: Path):
    chosen = config(place, tmp_path / "run", **RUN, eval_data=str(place / "test.jsonl"))
    chosen.save(tmp_path / "config.yaml")
    threads = str(torch.get_num_threads())
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), threads], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "adapter_config.json").exists()

    result = train(TrainConfig.load(tmp_path / "config.yaml", {"resume": True}))
    assert result.resumed_from == 4
    assert (result.eval_loss_before, result.eval_loss_after) == (run.eval_loss_before, run.eval_loss_after)
    timing = {"tokens_per_second", "peak_memory_bytes", "wall_seconds", "eval_runtime"}
    untimed = [
        [{key: value for key, value in line.items() if key not in timing} for line in metrics(folder)]
        for folder in (place / "run", tmp_path / "run")
    ]
    assert untimed[0] == untimed[1]
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (place / "run" / name).read_bytes()


def test_a_finished_run_is_not_trained_again(place: Path, run: TrainResult, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qosora.training.run.resolve_run", None)
    again = TrainConfig.load(place / "run" / "train_config.yaml", {"resume": True})
    assert train(again) == run


def test_resuming_nothing_begins(place: Path, tmp_path: Path):
    result = train(config(place, tmp_path / "run", resume=True, max_steps=1, save_steps=0))
    assert (result.steps, result.resumed_from) == (1, None)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        train(config(place, tmp_path / "run"))
    assert train(config(place, tmp_path / "run", overwrite=True, max_steps=2)).steps == 2


# ---- variants


def interrupted_after_the_last_step(run: TrainResult, folder: Path) -> Path:
    """A copy of a finished run as it is before what is written last, in one go."""
    shutil.copytree(run.output_dir, folder)
    kept = ("checkpoint-", "metrics.jsonl", "train_config.yaml", "made_of.json")
    for path in folder.iterdir():
        if not path.name.startswith(kept):
            path.unlink()
    return folder


def test_a_run_that_has_done_its_last_step_does_no_other(place: Path, run: TrainResult, tmp_path: Path):
    folder = interrupted_after_the_last_step(run, tmp_path / "run")
    options = {**RUN, "eval_data": str(place / "test.jsonl"), "resume": True}
    again = train(config(place, folder, **options))
    assert (again.steps, again.resumed_from) == (10, 10)
    assert (again.eval_loss_before, again.eval_loss_after) == (run.eval_loss_before, run.eval_loss_after)
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (Path(run.output_dir) / name).read_bytes()
    assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, 11))


@pytest.mark.parametrize("what", ["data", "base"])
def test_a_run_is_not_resumed_on_something_else(what: str, place: Path, run: TrainResult, tmp_path: Path):
    folder = interrupted_after_the_last_step(run, tmp_path / "run")
    options: dict[str, Any] = {**RUN, "eval_data": str(place / "test.jsonl"), "resume": True}
    error: type[QosoraError]
    if what == "data":
        options["data"] = str(write_jsonl(tmp_path / "train.jsonl", sums(17)))
        error, said = ConfigError, r"cannot be resumed: the training data \(or its tokenizer\) changed since it began"
    else:
        source = make_checkpoint(tmp_path / "llama", "llama-text", seed=5)
        options["model"] = str(make_base(tmp_path / "other", source, QosoraConfig(rank=16)))
        error, said = FingerprintError, "was trained on the base with fingerprint"
    before = names_in(folder)
    with pytest.raises(error, match=said):
        train(config(place, folder, **options))
    assert names_in(folder) == before
    moved = {**options, "model": str(place / "base"), "data": str(tmp_path / "moved.jsonl")}
    shutil.copy(place / "train.jsonl", moved["data"])
    assert train(config(place, folder, **moved)).steps == 10  # the same rows in another place are the same


def test_an_adapter_is_gone_on_with(place: Path, run: TrainResult, tmp_path: Path):
    more = train(config(place, tmp_path / "more", model=run.output_dir, max_steps=2, learning_rate=1e-9))
    assert more.steps == 2
    vectors, before = (load_file(Path(f) / "adapter_model.safetensors") for f in (more.output_dir, run.output_dir))
    assert vectors.keys() == before.keys()
    for name, vector in vectors.items():
        torch.testing.assert_close(vector, before[name], rtol=1e-6, atol=1e-7)
    assert adapter_config(more.output_dir).base_model_name_or_path == str(place / "base")
    with pytest.raises(ConfigError, match="is an adapter, whose config says what is trained: leave out vectors"):
        train(config(place, tmp_path / "other", model=run.output_dir, vectors="s"))


def test_a_run_that_fails_at_its_first_step_can_be_begun_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = config(place, tmp_path / "run", max_steps=2)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qosora.training.trainer.QosoraTrainer.training_step", fail)
        with pytest.raises(KeyboardInterrupt):
            train(chosen)
    assert not (tmp_path / "run").exists()
    assert train(chosen).steps == 2


@pytest.mark.parametrize("name", ["tensorboard", "nonsense"])
def test_a_missing_reporter_is_found_before_the_model_is_loaded(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    monkeypatch.setattr(qosora.training.run, "load_base", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=f"report_to: '{name}' cannot be used here: "):
        train(config(place, tmp_path / "run", report_to=[name]))


def test_home_in_every_path(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("USERPROFILE", str(place))
    options = {"model": "~/base", "data": "~/train.jsonl", "eval_data": "~/test.jsonl", "max_steps": 1}
    assert train(config(place, tmp_path / "run", **options)).steps == 1


def test_packing_keeps_examples_apart(place: Path, tmp_path: Path):
    options: dict[str, Any] = {"max_steps": 1, "limit": 4, "batch_size": 4}
    plain = train(config(place, tmp_path / "a", **options))
    packed = train(config(place, tmp_path / "b", **options, packing=True, max_length=64))
    # Four examples in one sequence: the same tokens with the same contexts, so the same mean, to float32 rounding.
    assert packed.train_loss == pytest.approx(plain.train_loss, rel=rounding(torch.float32))


@pytest.mark.slow
def test_gradient_accumulation_is_a_larger_batch(place: Path, tmp_path: Path):
    small = train(config(place, tmp_path / "a", max_steps=3, limit=8, batch_size=2, gradient_accumulation=4))
    large = train(config(place, tmp_path / "b", max_steps=3, limit=8, batch_size=8))
    assert small.train_loss == pytest.approx(large.train_loss, rel=rounding(torch.float32))


def test_modules_to_save_in_bf16(place: Path, tmp_path: Path):
    chosen = config(place, tmp_path / "run", modules_to_save=["lm_head"], precision="bf16", max_steps=3)
    result = train(TrainConfig(**{**chosen.to_dict(), "eval_data": str(place / "test.jsonl")}))
    assert result.trained_parameters == 1120 + 258 * 64
    assert result.eval_loss_after is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss_after < result.eval_loss_before
    model = load_model(tmp_path / "run", dtype=torch.bfloat16)
    assert len(generate(model, make_tokenizer(), ["1 + 1 ="], max_new_tokens=2)) == 1
    loss = evaluate(model, make_tokenizer(), place / "test.jsonl").loss
    assert loss == pytest.approx(result.eval_loss_after, rel=1e-2)  # the head is rounded to bfloat16, or not


def test_evaluation_on_the_way_and_one_vector(place: Path, tmp_path: Path):
    result = train(
        config(
            place,
            tmp_path / "run",
            max_steps=4,
            eval_data=str(place / "test.jsonl"),
            eval_steps=2,
            vectors="s",
            target_modules=[r".*\.(q|v)_proj"],
            optimizer="paged_lion_8bit",
        )
    )
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval_loss" in line] == [0, 2, 4]
    assert result.trained_parameters == 2 * 2 * 16


def test_trainers_own_machinery_is_reachable(place: Path, tmp_path: Path):
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "eval_loss"}
    options: dict[str, Any] = {"eval_data": str(place / "test.jsonl"), "eval_steps": 2, "save_steps": 2}
    result = train(config(place, tmp_path / "run", max_steps=4, trl=best, **options))
    first = next(line for line in metrics(tmp_path / "run") if line["step"] == 2 and "eval_loss" in line)
    assert result.eval_loss_after == first["eval_loss"]  # the worst, as was asked


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"text": "once upon a time"}], {}),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], {}),
        (sums(3), {"chat": True}),
        ([{"question": "a", "answer": "b"}], {"prompt_column": "question", "completion_column": "answer"}),
    ],
)
def test_kinds_of_data(place: Path, tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any]):
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert train(config(place, tmp_path / "run", data=str(data), max_steps=1, **options)).steps == 1


@pytest.mark.parametrize(("options", "rate"), [({}, 5e-5), ({"modules_to_save_learning_rate": 3e-3}, 3e-3)])
def test_learning_rates_reach_the_optimizer(place: Path, tmp_path: Path, options: dict[str, Any], rate: float):
    chosen = config(place, tmp_path / "run", modules_to_save=["lm_head"], learning_rate=5e-3, **options)
    trainer, _ = qosora.training.run._trainer(resolve_run(chosen, RunFolder(chosen), Processes()))
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [5e-3, rate]


def test_config_json_is_read_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer, own, sources = load_tokenizer(place / "base"), AutoConfig.from_pretrained, []

    def from_pretrained(source: str, **options: Any) -> Any:
        sources.append(source)
        return own(source, **options)

    monkeypatch.setattr("qosora.training.checks.load_tokenizer", lambda *_, **__: tokenizer)  # transformers' affair
    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    train(config(place, tmp_path / "run", max_steps=1))
    assert sources == [str(place / "base")]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_tiles_change_no_loss(place: Path, tmp_path: Path, checkpointing: bool):
    losses = []
    for tile_length in (0, 8):
        folder = tmp_path / str(tile_length)
        options = {"tile_length": tile_length, "gradient_checkpointing": checkpointing, "max_steps": 3}
        train(config(place, folder, **options))
        losses.append([line["loss"] for line in metrics(folder)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "mlps"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"gradient_checkpointing": False, "tile_length": 8}, True),
    ],
)
def test_mlps_are_tiled_where_it_costs_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], mlps: bool
):
    tiled = []
    monkeypatch.setattr(
        "qosora.training.run.apply_tiling", lambda *args, **kwargs: tiled.extend(apply_tiling(*args, **kwargs))
    )
    train(config(place, tmp_path / "run", max_steps=1, **options))
    assert any(name.endswith(".mlp") for name in tiled) is mlps
    assert any(name.endswith(".input_layernorm") for name in tiled)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"activation_offloading": True}, {"packing": True}])
def test_on_a_gpu(place: Path, tmp_path: Path, options: dict[str, Any]):
    result = train(config(place, tmp_path / "run", eval_data=str(place / "test.jsonl"), **options))
    assert result.precision == options.get("precision", "bf16")
    assert result.eval_loss_after is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss_after < result.eval_loss_before


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["nonsense"]}, "nonsense"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
        ({"trl": {"loss_type": "nonsense"}}, "Supported values are"),
    ],
)
def test_what_only_the_trainer_can_tell(place: Path, nothing_left: Path, options: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        train(config(place, nothing_left, **options))


def test_out_of_memory_says_what_to_lower(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("qosora.training.run.QosoraTrainer.train", fail)
    expected = r"out of GPU memory: lower batch_size \(4\), .*; or lower max_length \(1024\); or turn activation_off"
    with pytest.raises(QosoraError, match=expected):
        train(config(place, tmp_path / "run"))


def test_embeddings_that_are_changed_in_place_do_not_go_with_checkpointing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As in transformers' Git, Blt and Udop, which TRL cannot train so with LoRA either."""
    forward = LlamaModel.forward

    def in_place(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        embedded = self.embed_tokens(input_ids)
        embedded += 1
        return forward(self, inputs_embeds=embedded, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", in_place)
    with pytest.raises(QosoraError, match=r"changes its embeddings in place.*turn gradient_checkpointing off"):
        train(config(place, tmp_path / "run", max_steps=1))
    train(config(place, tmp_path / "another", max_steps=1, gradient_checkpointing=False))


def test_the_cpu_is_told_of_once(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        train(config(place, tmp_path / "run", max_steps=1))
    assert [record.name for record in caplog.records] == ["qosora"]

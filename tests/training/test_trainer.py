"""The trainer's own parts: its checkpoints, its record of each step, and its progress bar."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import assert_same_tensors, make_tokenizer, sums
from training_runs import RUN, config, metrics, names_in

from qosora.data import load_records, tokenize
from qosora.errors import QosoraError
from qosora.training.run import TrainResult, train
from qosora.training.run_folder import MetricsLog
from qosora.training.trainer import QosoraTrainer, Recorder, peak_memory_bytes


def test_a_checkpoint_is_vectors_and_states_alone(place: Path, run: TrainResult):
    checkpoint = place / "run" / "checkpoint-4"
    assert names_in(checkpoint) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth",
        "scheduler.pt", "trainer_state.json",
    }  # fmt: skip
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == run.trained_parameters
    assert all(t.dtype == torch.float32 and t.ndim == 1 for t in tensors.values())


def test_metrics_have_a_line_for_each_step(place: Path, run: TrainResult):
    lines = [line for line in metrics(place / "run") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert set(lines[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "mean_token_accuracy", "entropy", "tokens",
        "tokens_per_second", "peak_memory_bytes", "wall_seconds",
    }  # fmt: skip
    assert lines[7]["tokens"] == 2 * sum(len(r["prompt"] + r["completion"]) + 2 for r in sums(16))  # two epochs
    assert lines[0]["peak_memory_bytes"] > 2**25
    assert run.train_loss == lines[-1]["loss"]


def test_a_run_says_little(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    train(config(place, tmp_path / "run", max_steps=2, progress=True, save_steps=1))
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line]
    assert all(line.startswith("train: ") for line in lines)
    assert "loss 5." in lines[-1]
    assert "tokens/s" in lines[-1]
    assert "GiB" in lines[-1]


def test_trying_the_longest_batch_changes_nothing(
    place: Path, run: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own, lengths = QosoraTrainer.train, []

    def tried_first(self: QosoraTrainer, **options: Any) -> Any:
        examples = tokenize(load_records(place / "train.jsonl"), make_tokenizer(), max_length=1024).examples
        self.model.get_base_model().get_input_embeddings().register_forward_pre_hook(
            lambda _, args: lengths.append(args[0].shape)
        )
        self.try_longest_batch(examples)
        assert lengths == [(self.args.per_device_train_batch_size, max(len(e.input_ids) for e in examples))]
        assert all(p.grad is None for p in self.model.parameters())
        return own(self, **options)

    monkeypatch.setattr(QosoraTrainer, "train", tried_first)
    again = train(config(place, tmp_path / "run", **RUN, eval_data=str(place / "test.jsonl")))
    assert again.train_loss == run.train_loss
    assert_same_tensors(*(load_file(f / "adapter_model.safetensors") for f in (tmp_path / "run", place / "run")))
    kept = ("step", "loss", "grad_norm", "mean_token_accuracy", "entropy", "tokens")
    mine, other = ([{k: line.get(k) for k in kept} for line in metrics(f)] for f in (tmp_path / "run", place / "run"))
    assert mine == other


def test_a_run_that_diverges_stops(place: Path, tmp_path: Path):
    with pytest.raises(QosoraError, match=r"the loss is (nan|inf) at step \d: training diverged"):
        train(config(place, tmp_path / "run", learning_rate=1e30, max_grad_norm=0, warmup_ratio=0))
    assert not (tmp_path / "run" / "adapter_config.json").exists()


# ---- the recorder alone


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(MetricsLog(tmp_path / "metrics.jsonl"), progress=False)


def state(step: int, tokens: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=4, num_input_tokens_seen=tokens)


ARGS = SimpleNamespace(fp16=False)
LOGS = {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": 0.25}


def test_speed_counts_the_tokens_since_the_last_line(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 14.0, 20.0, 21.0])
    recorder.start = 9.0
    monkeypatch.setattr("qosora.training.trainer.time.perf_counter", lambda: next(clock))
    recorder.on_train_begin(ARGS, state(0, 100), None)  # at 10: a run that was resumed has seen tokens
    recorder.on_log(ARGS, state(1, 180), None, LOGS)  # at 14
    recorder.on_log(ARGS, state(1, 180), None, {"eval_loss": 2.0, "eval_perplexity": 7.4, "epoch": 0.25})  # until 20
    more = {"reward": 3, "num_tokens": 200.0, "kl": float("nan")}
    recorder.on_log(ARGS, state(2, 200), None, LOGS | more)  # at 21: evaluation is not training time
    first, evaluated, second = recorder.metrics.read()
    assert (first["tokens"], first["tokens_per_second"], first["wall_seconds"]) == (180, 20.0, 5.0)
    assert evaluated == {"step": 1, "eval_loss": 2.0, "eval_perplexity": 7.4}
    assert (second["step"], second["tokens_per_second"], second["wall_seconds"]) == (2, 20.0, 12.0)
    assert second["reward"] == 3  # whatever a trainer logs
    assert "num_tokens" not in second


@pytest.mark.parametrize(("fp16", "advice"), [(False, "Lower learning_rate$"), (True, "or train in bf16")])
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_written_and_ends_the_run(recorder: Recorder, loss: float, fp16: bool, advice: str):
    recorder.on_train_begin(ARGS, state(0, 0), None)
    with pytest.raises(QosoraError, match=f"the loss is {loss} at step 3: training diverged.*{advice}"):
        recorder.on_log(SimpleNamespace(fp16=fp16), state(3, 10), None, LOGS | {"loss": loss})
    assert len(recorder.metrics.read()) == 1


def test_what_is_no_step_leaves_no_line_and_closing_needs_no_beginning(recorder: Recorder):
    recorder.on_log(ARGS, state(4, 10), None, {"train_runtime": 3.0})
    recorder.on_log(ARGS, state(4, 10), None, None)
    recorder.close()
    assert recorder.metrics.read() == []


def test_peak_memory_is_in_bytes_and_only_grows():
    before = peak_memory_bytes()
    held = torch.ones(2**22)
    assert peak_memory_bytes() >= before > 2**25
    assert held.nbytes == 2**24

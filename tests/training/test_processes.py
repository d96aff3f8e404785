"""Several processes train what one with the batches of all trains; what one of them cannot do ends all, told once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_runs
import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXT_VOCAB, make_base, make_tokenizer, sums, write_jsonl
from training_runs import metrics

from qosora.config import QosoraConfig
from qosora.training.config import TrainConfig
from qosora.training.run import train

COUNT = 2
#: Not a whole number of rounds; epsilon hides that AdamW's first steps are the signs of gradients, however small.
EXAMPLES, EPSILON = 11, {"adam_epsilon": 1e-3}
#: Options of a run beside those of all runs; batch_size is that of one process.
RUNS: dict[str, dict[str, Any]] = {
    "uneven": {"eval_steps": 2},
    "accumulated": {"batch_size": 1, "gradient_accumulation": 2, "update_rank": 2},
    "packed": {"packing": True, "max_length": 32, "batch_size": 1},
    # the loss of the router is one of each batch, however many there are
    "sharded": {"strategy": "fsdp", "eval_steps": 2, "eval_batch_size": 2},
    "sharded on the host": {"strategy": "fsdp", "base_on": "host", "packing": True, "max_length": 32, "batch_size": 1},
    "sharded and tied": {"strategy": "fsdp", "model": "tied", "vectors": "s"},
    "sharded mixture": {
        "strategy": "fsdp",
        "model": "experts",
        "trl": {**EPSILON, "router_aux_loss_coef": 0.0},
        "gradient_checkpointing": False,
    },
    "mixture": {"model": "experts", "trl": {**EPSILON, "router_aux_loss_coef": 0.0}},
    # TRL takes the mean of a batch's pairs, so all batches have as many
    "preferences": {"method": "dpo", "data": "pairs.jsonl", "eval_data": "pairs.jsonl", "eval_batch_size": 2},
    "sharded preferences": {
        "method": "dpo", "data": "pairs.jsonl", "eval_data": "pairs.jsonl", "eval_batch_size": 2, "strategy": "fsdp",
        "base_on": "host",
    },
}  # fmt: skip
#: Each process makes answers of its own.
REWARDED: dict[str, Any] = {
    "method": "grpo", "reward": ["regex:[a-z]"], "batch_size": 4, "max_completion_length": 4, "max_steps": 2,
}  # fmt: skip


def launch(script: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in `COUNT` processes, to the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={COUNT}", *script]
    here = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here, **options}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def folder(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and with a base that has experts."""
    folder = tmp_path_factory.mktemp("processes")
    make_base(folder / "experts", "qwen3_moe", QosoraConfig(rank=8), vocab_size=TEXT_VOCAB, max_position_embeddings=64)
    make_tokenizer().save_pretrained(folder / "experts")
    write_jsonl(folder / "train.jsonl", sums(EXAMPLES))
    write_jsonl(folder / "test.jsonl", sums(5, 100))
    pairs = [{"prompt": f"{a}+{a}=", "chosen": f"{2 * a}", "rejected": f"{a - 1}, or so"} for a in range(2, 10)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def options(place: Path, folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """Return the options of a run whose output is in `folder`/name."""
    chosen = {
        "data": "train.jsonl", "eval_data": "test.jsonl", "batch_size": 2, "max_steps": 8,
        "save_steps": 4, "progress": False, "trl": EPSILON, "output_dir": str(folder / name), **more,
    }  # fmt: skip
    model = chosen.pop("model", "base")
    chosen |= {key: str(folder / chosen[key]) for key in ("data", "eval_data")}
    return {**chosen, "model": str((folder if model == "experts" else place) / model)}


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, TEXT_VOCAB, (9,), generator=generator).tolist() for _ in range(4 * COUNT)]


@pytest.fixture(scope="module")
def outcomes(place: Path, folder: Path) -> list[dict[str, Any]]:
    """What came of all runs, by name, in each process."""
    alone = options(place, folder, "begun alone", batch_size=2 * COUNT)
    assert "KeyboardInterrupt" in distributed_runs.outcome("train", stop_after=5, **alone)
    stopped = options(place, folder, "stopped")
    runs = {name: {"how": "train", **options(place, folder, name, **more)} for name, more in RUNS.items()}
    runs |= {
        "stopped": {"how": "train", **stopped, "stop_after": 5},
        "gone on": {"how": "train", **stopped, "resume": True},
        "to be gone on alone": {
            "how": "train", **options(place, folder, "gone on alone"), "stop_after": 5,
        },
        "begun alone": {"how": "train", **alone, "batch_size": 2, "resume": True},
        "sharded and stopped": {
            "how": "train", **options(place, folder, "sharded in turn", strategy="fsdp"), "stop_after": 5,
        },
        "sharded and gone on": {
            "how": "train", **options(place, folder, "sharded in turn", base_on="host"), "resume": True,
        },
        "rewarded": {"how": "train", **options(place, folder, "rewarded", **REWARDED)},
        "rewarded and sharded": {
            "how": "train", **options(place, folder, "no", strategy="fsdp", **REWARDED),
        },
        "finished": {"how": "train", **stopped, "resume": True},
        "other batches": {"how": "train", **options(place, folder, "gone on alone", batch_size=3), "resume": True},
        "bad": {"how": "train", **options(place, folder, "bad"), "bad_on": "1"},
        "used": {"how": "train", **stopped},
        "by hand": {
            "how": "by hand", "model": str(place / "base"), "rows": rows(), "output_dir": str(folder / "hand"),
            "batch_size": 2,
        },
    }  # fmt: skip
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    done = launch([distributed_runs.__file__, str(folder / "runs.json"), str(folder)])
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(COUNT)]


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 2e-6 * tensor.abs().max(), name


@pytest.mark.parametrize("name", RUNS)
def test_several_processes_train_what_one_does(name: str, place: Path, folder: Path, outcomes: list[Any]) -> None:
    together = [outcome[name] for outcome in outcomes]
    assert together[0] == {**together[1], "wall_seconds": together[0]["wall_seconds"]}
    chosen = options(place, folder, name, **RUNS[name])
    size = chosen["batch_size"] * COUNT * chosen.get("gradient_accumulation", 1)
    alone = folder / f"{name} in one"
    chosen |= {"output_dir": str(alone), "batch_size": size, "gradient_accumulation": 1, "base_on": "gpu"}
    result = train(TrainConfig(**chosen))
    assert (together[0]["processes"], result.processes) == (COUNT, 1)
    vectors = load_file(folder / name / "adapter_model.safetensors")
    assert_close(vectors, load_file(alone / "adapter_model.safetensors"))
    for mine, theirs in zip(metrics(folder / name), metrics(alone), strict=True):
        assert set(mine) == set(theirs)
        for key in {"step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss"} & set(mine):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert together[0]["eval_loss_after"] == pytest.approx(result.eval_loss_after, rel=1e-6)


def test_each_process_makes_and_judges_answers(folder: Path, outcomes: list[Any]) -> None:
    together = [outcome["rewarded"] for outcome in outcomes]
    assert together[0] == {**together[1], "wall_seconds": together[0]["wall_seconds"]}
    assert (together[0]["processes"], together[0]["steps"]) == (COUNT, 2)
    assert [line["step"] for line in metrics(folder / "rewarded") if "reward" in line] == [1, 2]
    assert "use strategy ddp" in outcomes[0]["rewarded and sharded"]
    assert outcomes[1]["rewarded and sharded"].startswith("EndedElsewhere")
    assert not (folder / "no").exists()


def test_interrupted_runs_go_on_in_as_many_processes_or_others(place: Path, folder: Path, outcomes: list[Any]) -> None:
    assert [o["stopped"] for o in outcomes] == ["KeyboardInterrupt: "] * COUNT
    whole = load_file(folder / "uneven" / "adapter_model.safetensors")
    assert {o["gone on"]["resumed_from"] for o in outcomes} == {4}
    for name, tensor in load_file(folder / "stopped" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name
    assert {o["sharded and gone on"]["resumed_from"] for o in outcomes} == {4}
    for name, tensor in load_file(folder / "sharded in turn" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name
    assert {o["begun alone"]["resumed_from"] for o in outcomes} == {4}
    assert_close(load_file(folder / "begun alone" / "adapter_model.safetensors"), whole)
    alone = options(place, folder, "gone on alone", batch_size=4, gradient_accumulation=1, resume=True)
    assert train(TrainConfig(**alone)).resumed_from == 4
    assert_close(load_file(folder / "gone on alone" / "adapter_model.safetensors"), whole)
    assert [o["finished"]["steps"] for o in outcomes] == [8] * COUNT


def test_a_run_goes_on_with_as_many_examples_a_step(place: Path, folder: Path, outcomes: list[Any]) -> None:
    told = "takes 4 examples in a step, and this one would take 6: batch_size times gradient_accumulation times"
    assert told in outcomes[0]["other batches"]
    assert outcomes[1]["other batches"].startswith("EndedElsewhere")


def test_what_one_process_cannot_do_ends_all_and_is_told_once(folder: Path, outcomes: list[Any]) -> None:
    assert outcomes[0]["bad"] == "EndedElsewhere: process 1 of 2 ended; see what it said"
    assert outcomes[1]["bad"].startswith("DataError: none.jsonl")
    assert not (folder / "bad").exists()
    assert "holds an earlier run" in outcomes[0]["used"]
    assert outcomes[1]["used"].startswith("EndedElsewhere")


def test_a_trainer_of_trl_with_the_packed_optimizer(place: Path, folder: Path, outcomes: list[Any]) -> None:
    alone = distributed_runs.by_hand(str(place / "base"), rows(), str(folder / "hand alone"), 2 * COUNT)
    for outcome in outcomes:
        got = {name: torch.tensor(values) for name, values in outcome["by hand"].items()}
        assert_close(got, {name: torch.tensor(values) for name, values in alone.items()})
    assert outcomes[0]["by hand"] == outcomes[1]["by hand"]


_KILLED = """
import os, signal, sys
from qosora.training import Recorder
own = Recorder.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    own(self, args, state, control, **kwargs)
    if (state.global_step, os.environ["RANK"]) == (5, "1"):
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.on_step_end = on_step_end
from qosora.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_command(place: Path, folder: Path, outcomes: list[Any]) -> None:
    script = folder / "killed.py"
    script.write_text(_KILLED, encoding="utf-8")
    chosen = options(place, folder, "killed")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items() if name not in ("progress", "trl")]
    command = [str(script), "train", *flags, "--trl=adam_epsilon=0.001", "--no-progress"]
    done = launch(command)  # which waits for 300 seconds at most
    assert done.returncode == 1
    assert f"exitcode  : {-signal.SIGKILL}" in done.stderr
    result = train(TrainConfig(**{**chosen, "batch_size": 4, "resume": True}))
    assert result.resumed_from == 4
    whole = load_file(folder / "uneven" / "adapter_model.safetensors")
    assert_close(load_file(folder / "killed" / "adapter_model.safetensors"), whole)

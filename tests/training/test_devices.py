"""What GPUs need that are not here: another device than the current one, streams, paging, offloading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.utils.dlpack import from_dlpack
from training_runs import config

from qosora.compat.bitsandbytes import allocate_states, launching
from qosora.compat.trl import know_parameters_again
from qosora.training.flat_buffers import why_unpaged
from qosora.training.optimizer import create_optimizer
from qosora.training.run import train


def test_states_are_paged_on_linux_and_nvidia_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.release", lambda: "6.8.0")
    assert why_unpaged(cuda) is None
    for kind in ("cpu", "mps", "xpu"):
        assert why_unpaged(torch.device(kind)) == f"the parameters are on {kind}"
    monkeypatch.setattr("platform.release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert why_unpaged(cuda) == "managed memory does not page under Windows"
    monkeypatch.setattr("platform.release", lambda: "10")
    monkeypatch.setattr("sys.platform", "win32")
    assert why_unpaged(cuda) == "managed memory does not page under Windows"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_unpaged(cuda) == "a ROCm build of torch has no CUDA managed memory"


def test_bitsandbytes_launches_on_the_tensors_device_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches in stream 0 of the current device: that waits for torch's current stream, and that for it."""
    done: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def device_of(tensor: Any) -> Iterator[None]:
        done.append(f"on device {tensor.index}")
        yield
        done.append("back")

    side, default = Stream("side"), Stream("default")
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: default)
    tensor: Any = SimpleNamespace(is_cuda=True, index=1)
    for current, expected in (
        (side, ["on device 1", "default waits for side", "launched", "side waits for default", "back"]),
        (default, ["on device 1", "launched", "back"]),
    ):
        done.clear()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda current=current: current)
        with launching(tensor):
            done.append("launched")
        assert done == expected
    done.clear()
    with launching(torch.empty(1)):
        pass
    assert not done


def test_everything_of_bitsandbytes_runs_where_the_vectors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building, updating, saving and loading on a GPU that is not the current one."""
    inside: list[bool] = []

    @contextmanager
    def here(tensor: torch.Tensor) -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    def require(function: Any) -> Any:
        def checked(*args: Any, **kwargs: Any) -> Any:
            assert inside, f"{function} outside of the tensor's device"
            return function(*args, **kwargs)

        return checked

    monkeypatch.setattr("qosora.training.flat_buffers.launching", here)
    monkeypatch.setattr("qosora.training.flat_buffers.from_dlpack", require(from_dlpack))
    monkeypatch.setattr("qosora.training.flat_buffers.allocate_states", require(allocate_states))
    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", require(bitsandbytes.optim.AdamW.step))
    optimizers = []
    for _ in range(2):
        layer = nn.Linear(40, 30)
        optimizers.append(create_optimizer(layer, lr=1e-2))
        layer(torch.ones(1, 40)).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert not inside


def test_offloading_is_told_where_the_optimizer_has_put_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL notes in its constructor which memory is parameters'; what it does not know there it offloads."""
    model = nn.Linear(40, 30)
    made: list[set[int]] = []

    def offloading(model: nn.Module) -> str:
        made.append({p.data_ptr() for p in model.parameters()})
        return "context"

    monkeypatch.setattr("trl.models.get_act_offloading_ctx_manager", offloading)
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(activation_offloading=True))
    offloading(model)
    optimizer = create_optimizer(model, lr=1e-2)
    know_parameters_again(trainer)
    assert trainer.maybe_activation_offload_context == "context"
    assert made[0] != made[1] == {w.data_ptr() for buffer in optimizer.buffers for w in buffer.windows}
    know_parameters_again(SimpleNamespace(model=model, args=SimpleNamespace(activation_offloading=False)))
    assert len(made) == 2


def test_the_trainer_tells_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(
        "qosora.training.trainer.know_parameters_again", lambda trainer: told.append(trainer.optimizer is not None)
    )
    train(config(place, tmp_path / "run", max_steps=1))
    assert told == [True]

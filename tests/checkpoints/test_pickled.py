"""Pickled weights: read without running what they hold, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from read_state import State, assert_equal, read
from safetensors.torch import load_file
from tiny import make_checkpoint

from qosora.checkpoints.source import open_source
from qosora.errors import CheckpointError


def pickle_weights(source: Path, *, shards: int = 1, legacy: bool = False) -> State:
    """Replace a folder's safetensors by pickled weights, and return them."""
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    options = {"_use_new_zipfile_serialization": not legacy}
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin", **options)
        return state
    files = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, source / file, **options)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return state


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("llama-tied-bias", torch.float16), ("gpt2", torch.float32)]
)
def test_pickled_weights(family: str, dtype: torch.dtype, shards: int, legacy: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source", family, dtype=dtype)
    state = pickle_weights(folder, shards=shards, legacy=legacy)
    with open_source(folder) as source:
        assert_equal(read(source.reader), state)
        assert source.origin == folder
        assert source.files == tuple(sorted(folder.glob("pytorch_model*.bin")))


def test_pickled_tensors_that_share_memory_or_have_strides(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder)
    flat = torch.arange(24.0)
    state = {"a": flat.view(4, 6), "tied": flat.view(4, 6), "part": flat[5:9], "transposed": torch.randn(3, 5).T}
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    torch.save(state, folder / "pytorch_model.bin")
    with open_source(folder) as source:
        got = read(source.reader)
    assert_equal(got, state)
    assert len({tensor.untyped_storage().data_ptr() for tensor in got.values()}) == len(got)
    assert not got["parameter"].requires_grad


def test_one_shard_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "source")
    files = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(pickle_weights(folder, shards=3))}
    opened: list[str] = []
    load = torch.load

    def recorded(path: Path, **options: Any) -> Any:
        opened.append(path.name)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", recorded)
    with open_source(folder) as source:
        assert opened == []
        for name in sorted(files, key=files.__getitem__):
            source.reader.tensor(name)
        for name in files:  # known from the first opening
            source.reader.shape(name)
    assert opened == sorted(set(files.values()))


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_that_runs_code_is_refused(save: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder)
    save({"weight": Attack(tmp_path / "trace")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin names posix.mkdir, .* get the model as safet"):
        open_source(folder).__enter__()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 1, 50, 2000, -100])
def test_a_truncated_pickle_is_refused(keep: int, legacy: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder, legacy=legacy)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: not a whole file of pickled tensors .*another copy"):
        open_source(folder).__enter__()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch 2.14, of the last one
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "expected tensors by name, got Tensor"),
        ({"model": {"weight": torch.ones(3)}}, "expected tensors by name, got dict as 'model'"),
        ({"epoch": 3}, "got int as 'epoch'"),
        ({"weight": torch.eye(3).to_sparse()}, "got Tensor as 'weight'"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder)
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_source(folder).__enter__()


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder, shards=2)
    index = folder / "pytorch_model.bin.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    for change, message in [
        ({"model.norm.weight": "../secret.bin"}, "the index is damaged"),
        ({"model.norm.weight": "absent.bin"}, "names absent.bin, which is missing"),
    ]:
        index.write_text(json.dumps({"weight_map": whole | change}))
        with pytest.raises(CheckpointError, match=message):
            open_source(folder).__enter__()
    index.write_text(json.dumps({"weight_map": whole | {"extra.weight": "pytorch_model-0.bin"}}))
    with open_source(folder) as source:
        for call in (source.reader.tensor, source.reader.shape):
            with pytest.raises(CheckpointError, match=r"pytorch_model-0.bin: no tensor 'extra.weight'"):
                call("extra.weight")
        with pytest.raises(CheckpointError, match="no tensor 'none'"):
            source.reader.tensor("none")

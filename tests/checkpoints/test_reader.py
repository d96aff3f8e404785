"""Reading: lazily, sharded or not, and what is said of damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from shard_files import INDEX, write_shards

from qosora.checkpoints.folders import write_json
from qosora.checkpoints.reader import CheckpointReader
from qosora.errors import CheckpointError


def test_a_folder_without_tensors(tmp_path: Path):
    assert write_shards(tmp_path, 100, {}).count == 1
    with CheckpointReader(tmp_path) as reader:
        assert reader.names() == []


def test_an_adapters_file_has_another_stem(tmp_path: Path):
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with CheckpointReader(tmp_path, "adapter_model") as reader:
        assert reader.names() == ["x"]
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        CheckpointReader(tmp_path)


def test_a_folder_that_is_missing_or_holds_only_pickles(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        CheckpointReader(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled"):
        CheckpointReader(tmp_path)


def test_an_index_that_names_a_missing_file(tmp_path: Path):
    write_shards(tmp_path, 1)
    (tmp_path / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json names model-00002-of-00005.safetensors, which is missing"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": ["x"]}, {"a": "../secret.safetensors"}])
def test_a_damaged_index(tmp_path: Path, weight_map: Any):
    save_file({"a": torch.ones(1)}, tmp_path.parent / "secret.safetensors")
    write_json(tmp_path / INDEX, {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match="the index is damaged"):
        CheckpointReader(tmp_path)


def test_an_index_that_names_a_tensor_which_the_file_lacks(tmp_path: Path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    write_json(tmp_path / INDEX, {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}})
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.tensor("a"), torch.ones(1))
        for access in (reader.tensor, reader.slice, reader.shape, reader.dtype):
            with pytest.raises(CheckpointError, match="cannot read 'b'"):
                access("b")


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b"garbage" * 99])
@pytest.mark.parametrize("max_shard_bytes", [10**6, 1])
def test_a_damaged_file(tmp_path: Path, damage: Any, max_shard_bytes: int):
    write_shards(tmp_path, max_shard_bytes)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(damage(file.read_bytes()))
    with (
        pytest.raises(CheckpointError, match="not a whole safetensors file"),
        CheckpointReader(tmp_path) as reader,
    ):
        reader.tensor("b.weight")

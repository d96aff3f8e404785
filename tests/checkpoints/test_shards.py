"""Shards, written in any order, are what safetensors writes and reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shard_files import INDEX, TENSORS, write_shards

from qosora.checkpoints.folders import read_json
from qosora.checkpoints.reader import CheckpointReader
from qosora.checkpoints.shards import Shards, StoredSpec
from qosora.errors import CheckpointError


@pytest.mark.parametrize(("max_shard_bytes", "count"), [(10**6, 1), (59, 2), (1, 5)])
def test_what_is_written_is_read(tmp_path: Path, max_shard_bytes: int, count: int):
    shards = write_shards(tmp_path, max_shard_bytes)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert shards.count == count
    assert shards.total_bytes == sum(t.nbytes for t in TENSORS.values())
    if count == 1:
        assert files == ["model.safetensors"]
    else:
        assert files == [*(f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)), INDEX]
        assert read_json(tmp_path / INDEX)["metadata"]["total_size"] == shards.total_bytes
    with CheckpointReader(tmp_path) as reader:
        assert sorted(reader.names()) == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert name in reader
            assert torch.equal(reader.tensor(name), tensor)
            assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert tuple(reader.slice(name).get_shape()) == tuple(tensor.shape)
            assert reader.file(name).is_file()
        assert "d" not in reader
        with pytest.raises(CheckpointError, match="no tensor 'd'"):
            reader.tensor("d")
        with pytest.raises(CheckpointError, match="no tensor 'd'"):
            reader.slice("d")


def test_a_shard_is_what_safetensors_writes(tmp_path: Path):
    dtypes = [torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool]
    tensors = TENSORS | {f"{i % 3}.ü": torch.arange(5 + i).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {f"z.{i}": torch.arange(3).to(dtype) for i, dtype in enumerate(dtypes)}
    write_shards(tmp_path, 10**6, tensors)
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_nothing_loads_before_it_is_sealed(tmp_path: Path):
    specs = {name: StoredSpec.of(tensor) for name, tensor in TENSORS.items()}
    shards = Shards(tmp_path, specs, 10**6)
    assert shards.missing_bytes > shards.total_bytes
    shards.allocate()
    assert shards.missing_bytes == 0
    size = (tmp_path / "model.safetensors").stat().st_size
    for name, tensor in TENSORS.items():
        assert shards.write(name, tensor) == shards.digest(name)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"), CheckpointReader(tmp_path) as reader:
        reader.tensor("b.weight")
    shards.seal()
    assert (tmp_path / "model.safetensors").stat().st_size == size
    again = Shards(tmp_path, specs, 10**6)
    again.allocate()  # keeps what is there
    again.seal()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["b.weight"], TENSORS["b.weight"])


def test_values_are_cast_once_and_refused_where_they_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qosora.checkpoints.shards._CHUNK_NUMEL", 5)
    values = torch.linspace(-3, 3, 12).view(3, 4)
    shards = Shards(tmp_path, {"w": StoredSpec(torch.bfloat16, (3, 4)), "h": StoredSpec(torch.float16, (2,))}, 10**6)
    shards.allocate()
    shards.write("w", values)
    with pytest.raises(CheckpointError, match=r"h: its largest value, 7e\+04, does not fit into torch.float16"):
        shards.write("h", torch.tensor([1.0, -70_000.0]))
    with pytest.raises(CheckpointError, match="h holds NaN"):
        shards.write("h", torch.tensor([1.0, torch.nan]))
    with pytest.raises(CheckpointError, match=r"w was to have shape \(3, 4\), but has \(4, 3\)"):
        shards.write("w", values.T)
    shards.seal()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], values.bfloat16())


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"z has dtype torch\.complex128"):
        Shards(tmp_path, {"z": StoredSpec(torch.complex128, (2,))}, 100)


def test_shards_stay_under_their_size(tmp_path: Path):
    tensors = {f"layer.{i}": torch.full((10 + i % 3,), float(i)) for i in range(20)}
    tensors["large"] = torch.zeros(100)
    write_shards(tmp_path, 100, tensors)
    for file in tmp_path.glob("*.safetensors"):
        held = load_file(file)
        assert list(held) == ["large"] or sum(t.nbytes for t in held.values()) <= 100


def test_views_are_written_by_value(tmp_path: Path):
    square = torch.arange(9.0).view(3, 3)
    write_shards(tmp_path, 100, {"transposed": square.T})
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.tensor("transposed"), square.T)

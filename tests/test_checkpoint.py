"""Files: lazy reading, sharded writing, folders that are whole or not there, and the identity of a base."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_checkpoints import load, load_quantized, make_base, make_original, perturbed

from qosora import OsoraConfig, checkpoint, folders
from qosora.adapter import model_fingerprint
from qosora.checkpoint import CheckpointReader, ShardWriter, base_fingerprint, group_modules
from qosora.errors import CheckpointError
from qosora.folders import atomic_folder, read_json, require_space, write_json
from qosora.linear import qosora_modules

INDEX = "model.safetensors.index.json"
TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.packed": torch.arange(7, dtype=torch.uint8),
    "a.offset": torch.tensor(2.5),
    "c.half": torch.ones(2, 2, dtype=torch.bfloat16),
    "c.empty": torch.zeros(0, 3, dtype=torch.float16),
}


def write(folder: Path, max_shard_bytes: int, tensors: dict[str, torch.Tensor] = TENSORS) -> ShardWriter:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return writer


# Reader and writer


@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(10**6, 1), (59, 2), (1, 5)])
def test_what_is_written_is_read(tmp_path: Path, max_shard_bytes: int, shards: int):
    writer = write(tmp_path, max_shard_bytes)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) == writer.shard_count == shards
    assert not list(tmp_path.glob("*.tmp"))
    assert writer.total_bytes == sum(t.nbytes for t in TENSORS.values())
    if shards == 1:
        assert files == ["model.safetensors"]
        assert not (tmp_path / INDEX).exists()
    else:
        assert files == [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        assert read_json(tmp_path / INDEX)["metadata"]["total_size"] == writer.total_bytes
    with CheckpointReader(tmp_path) as reader:
        assert sorted(reader.names()) == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert name in reader
            assert torch.equal(reader.tensor(name), tensor)
            assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert tuple(reader.slice(name).get_shape()) == tuple(tensor.shape)
        assert "d" not in reader
        with pytest.raises(CheckpointError, match="no tensor 'd'"):
            reader.tensor("d")
        with pytest.raises(CheckpointError, match="no tensor 'd'"):
            reader.slice("d")


def test_shards_stay_under_their_size(tmp_path: Path):
    tensors = {f"layer.{i}": torch.full((10 + i % 3,), float(i)) for i in range(20)}
    tensors["large"] = torch.zeros(100)
    write(tmp_path, 100, tensors)
    for file in tmp_path.glob("*.safetensors"):
        held = load_file(file)
        assert list(held) == ["large"] or sum(t.nbytes for t in held.values()) <= 100


def test_a_writer_without_tensors(tmp_path: Path):
    assert write(tmp_path, 100, {}).shard_count == 1
    with CheckpointReader(tmp_path) as reader:
        assert reader.names() == []


def test_views_are_written_by_value(tmp_path: Path):
    square = torch.arange(9.0).view(3, 3)
    write(tmp_path, 100, {"transposed": square.T})
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.tensor("transposed"), square.T)


def test_a_name_twice_is_refused(tmp_path: Path):
    writer = ShardWriter(tmp_path, 1)
    writer.add("a", torch.ones(1))
    writer.add("b", torch.ones(1))
    with pytest.raises(CheckpointError, match="a was to be written twice"):
        writer.add("a", torch.ones(1))


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
    write(tmp_path, 1)
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
    write(tmp_path, max_shard_bytes)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(damage(file.read_bytes()))
    with (
        pytest.raises(CheckpointError, match="not a whole safetensors file"),
        CheckpointReader(tmp_path) as reader,
    ):
        reader.tensor("b.weight")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', b"\xff"])
def test_damaged_json(tmp_path: Path, text: str | bytes):
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        read_json(file)


# Folders


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    target = tmp_path / "new" / "parents" / "model"
    with atomic_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
    assert [file.name for file in target.iterdir()] == ["config.json"]
    assert list(target.parent.iterdir()) == [target]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


def write_and_fail(target: Path, error: BaseException | type[BaseException]) -> None:
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, CheckpointError])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error):
        write_and_fail(tmp_path / "new" / "model", error)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_used(tmp_path: Path):
    (tmp_path / "model").mkdir()
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "config.json").touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / "model", tmp_path / "model" / "config.json"]


def make_old(target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "model.safetensors").write_text("old")


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path):
    target = tmp_path / "model"
    make_old(target)
    with pytest.raises(CheckpointError, match="exists and is not empty"), atomic_folder(target):
        pass
    with pytest.raises(ValueError, match="stop"):
        write_and_fail(target, ValueError("stop"))
    assert (target / "config.json").read_text() == "old"
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert [(f.name, f.read_text()) for f in target.iterdir()] == [("config.json", "new")]
    assert list(tmp_path.iterdir()) == [target]


def test_the_old_folder_comes_back_if_the_new_one_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "model"
    make_old(target)
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.suffix == ".new":
            raise PermissionError("no")
        return rename(self, to)

    with pytest.raises(PermissionError), atomic_folder(target, overwrite=True):
        monkeypatch.setattr(Path, "rename", fail)
    assert (target / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_only_models_are_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").touch()
    with (
        pytest.raises(CheckpointError, match=r"holds 'thesis.tex' and no model"),
        atomic_folder(target, overwrite=True),
    ):
        pass
    with pytest.raises(CheckpointError, match="is a file"), atomic_folder(target / "thesis.tex", overwrite=True):
        pass
    with pytest.raises(CheckpointError, match="cannot make a folder"), atomic_folder(target / "thesis.tex" / "model"):
        pass
    monkeypatch.chdir(target)
    with pytest.raises(CheckpointError, match="the current folder"), atomic_folder("."):
        pass
    assert [file.name for file in target.iterdir()] == ["thesis.tex"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path):
    make_old(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").read_text() == "new"


WRITER = """
import sys, time
from qosora.folders import atomic_folder
with atomic_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "config.json").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(folders.fcntl is None, reason="no file locks on this system")
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path):
    target = tmp_path / "model"
    make_old(target)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, cwd=Path(checkpoint.__file__).parents[1]
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "config.json").write_text("mine")
        assert len(list(tmp_path.glob(".model*.new"))) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (target / "config.json").read_text() == "mine"
    with atomic_folder(tmp_path / "other"):
        pass
    assert len(list(tmp_path.glob(".model*.new"))) == 1  # not ours to remove
    with atomic_folder(target, overwrite=True):
        pass
    assert sorted(tmp_path.iterdir()) == [target, tmp_path / "other"]


def test_killed_between_the_two_renames(tmp_path: Path):
    make_old(tmp_path / ".model.qosora-x.old")
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    make_old(tmp_path / ".model.qosora-y.old")
    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    message = r"cannot write a shard of .* GiB are free there.*No space left"
    with pytest.raises(CheckpointError, match=message), atomic_folder(tmp_path / "model") as folder:
        write(folder, 1)
    with pytest.raises(CheckpointError, match=r"No space left.*make room"):
        write_and_fail(tmp_path / "model", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model"):
        (tmp_path / "nowhere").read_text()
    assert list(tmp_path.iterdir()) == []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**33, 2**32, 2**32))
    require_space(tmp_path / "new" / "model", 2**32)
    with pytest.raises(CheckpointError, match=r"needs 5.00 GiB, but 4.00 GiB are free"):
        require_space(tmp_path / "new" / "model", 5 * 2**30)


# Fingerprint


def of_files(base: Path) -> str:
    with CheckpointReader(base) as reader:
        groups = group_modules(reader.names())
        return base_fingerprint(
            {name.removeprefix(f"{module}."): reader.slice(name) for name in names} for module, names in groups.items()
        )


def test_a_layers_stored_tensors_are_grouped(tmp_path: Path):
    base = make_base(tmp_path / "base", make_original(tmp_path / "original", "gpt2"))
    with CheckpointReader(base) as reader:
        names = reader.names()
    groups = group_modules(names)
    assert sorted(groups) == sorted(qosora_modules(load(base)))
    parameters = load(base).get_submodule("transformer.h.0.attn.c_attn")._parameters
    stored = {name.rpartition(".")[2] for name in groups["transformer.h.0.attn.c_attn"]}
    assert stored == set(parameters) - {"bias"}
    assert all(set(group) <= set(names) for group in groups.values())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_fingerprint_is_stable(tmp_path: Path):
    original = make_original(tmp_path / "original", "llama")
    model = load_quantized(original)
    fingerprint = model_fingerprint(model)
    assert fingerprint is not None
    assert len(fingerprint) == 16
    assert model_fingerprint(load_quantized(original)) == fingerprint
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert of_files(tmp_path / "base") == fingerprint
    assert model_fingerprint(load(tmp_path / "base")) == fingerprint
    assert model_fingerprint(load(tmp_path / "base").to(torch.bfloat16)) == fingerprint
    assert model_fingerprint(load(tmp_path / "base").to(torch.float16)) == fingerprint

    adapted = perturbed(load(tmp_path / "base"))
    assert model_fingerprint(adapted) == fingerprint
    adapted.merge_adapter()
    assert model_fingerprint(adapted) == fingerprint
    adapted.unmerge_adapter()
    assert model_fingerprint(adapted) == fingerprint
    adapted.save_pretrained(tmp_path / "adapter")
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_fingerprint"] == fingerprint
    reloaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert model_fingerprint(reloaded) == fingerprint
    merged = adapted.merge_and_unload()
    assert model_fingerprint(merged) != fingerprint


def test_the_fingerprint_tells_bases_apart(tmp_path: Path):
    originals = {
        "llama": make_original(tmp_path / "llama", "llama"),
        "seed": make_original(tmp_path / "seed", "llama", seed=1),
        "gpt2": make_original(tmp_path / "gpt2", "gpt2"),
        "bfloat16": make_original(tmp_path / "bfloat16", "llama", torch.bfloat16),
    }
    sketched = {"rank": 4, "svd_oversampling": 2}  # a wider sketch of these small layers would make the SVD exact
    variants: list[tuple[str, dict[str, Any]]] = [
        *((name, {}) for name in originals),
        ("llama", {"rank": 7}),
        ("llama", {"rank_pattern": {"layers.1.mlp.up_proj": 7}}),
        ("llama", sketched),
        ("llama", {**sketched, "seed": 1}),
        ("llama", {**sketched, "svd": "exact"}),
        ("llama", {**sketched, "svd_iterations": 0}),
        ("llama", {"blocksize": 128}),
        ("llama", {"quant_type": "fp4"}),
        ("llama", {"double_quant": False}),
        ("llama", {"modules_to_not_convert": ["model.layers.1.mlp.up_proj"]}),
    ]
    found = [model_fingerprint(load_quantized(originals[name], **options)) for name, options in variants]
    assert len(set(found)) == len(variants), dict(zip(map(str, variants), found, strict=True))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_without_a_base_there_is_no_fingerprint(tmp_path: Path):
    assert model_fingerprint(torch.nn.Linear(3, 3)) is None
    model = load_quantized(make_original(tmp_path / "original", "llama"))
    assert model_fingerprint(model.to("meta")) is None
    assert get_peft_model(model, OsoraConfig()).peft_config["default"].base_fingerprint is None


def test_reading_the_fingerprint_reads_little(tmp_path: Path):
    """A sample of each tensor, so that an adapter for a 70B base is checked in the time of opening files."""
    packed = torch.zeros(2**26, dtype=torch.uint8)
    layer = {"weight": packed, "weight_absmax": packed[:9], "U": packed, "U_absmax": packed[:9], "s": torch.ones(4)}
    start = time.perf_counter()
    base_fingerprint([layer] * 20)
    assert time.perf_counter() - start < 0.5

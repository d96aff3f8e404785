"""Files: lazy reading, shards written in any order, and the identity of a base."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_checkpoints import load, load_quantized, make_base, make_original, perturbed

from qosora import OsoraConfig
from qosora.adapter import model_fingerprint
from qosora.checkpoints.fingerprint import base_fingerprint, group_modules
from qosora.checkpoints.folders import check_target, read_json, require_space, write_json
from qosora.checkpoints.reader import CheckpointReader
from qosora.checkpoints.shards import Shards, StoredSpec, require_finite
from qosora.errors import CheckpointError
from qosora.layers.linear import qosora_modules

INDEX = "model.safetensors.index.json"
TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.packed": torch.arange(7, dtype=torch.uint8),
    "a.offset": torch.tensor(2.5),
    "c.half": torch.ones(2, 2, dtype=torch.bfloat16),
    "c.empty": torch.zeros(0, 3, dtype=torch.float16),
}


def write(folder: Path, max_shard_bytes: int, tensors: dict[str, torch.Tensor] = TENSORS) -> Shards:
    folder.mkdir(exist_ok=True)
    shards = Shards(folder, {name: StoredSpec.of(tensor) for name, tensor in tensors.items()}, max_shard_bytes)
    shards.allocate()
    for name, tensor in reversed(tensors.items()):  # the order does not matter
        shards.write(name, tensor)
    shards.seal()
    return shards


# Reader and writer


@pytest.mark.parametrize(("max_shard_bytes", "count"), [(10**6, 1), (59, 2), (1, 5)])
def test_what_is_written_is_read(tmp_path: Path, max_shard_bytes: int, count: int):
    shards = write(tmp_path, max_shard_bytes)
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
    write(tmp_path, 10**6, tensors)
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
    write(tmp_path, 100, tensors)
    for file in tmp_path.glob("*.safetensors"):
        held = load_file(file)
        assert list(held) == ["large"] or sum(t.nbytes for t in held.values()) <= 100


def test_a_folder_without_tensors(tmp_path: Path):
    assert write(tmp_path, 100, {}).count == 1
    with CheckpointReader(tmp_path) as reader:
        assert reader.names() == []


def test_views_are_written_by_value(tmp_path: Path):
    square = torch.arange(9.0).view(3, 3)
    write(tmp_path, 100, {"transposed": square.T})
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.tensor("transposed"), square.T)


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


def make_old(target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text("old")


def test_what_may_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_old(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    for name in ("nothing", "empty"):
        check_target(tmp_path / name, overwrite=False)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        check_target(tmp_path / "model", overwrite=False)
    check_target(tmp_path / "model", overwrite=True)
    with pytest.raises(CheckpointError, match=r"holds 'thesis.tex' and no model"):
        check_target(tmp_path / "home", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        check_target(tmp_path / "home" / "thesis.tex", overwrite=True)
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(CheckpointError, match="the current folder"):
        check_target(tmp_path / "model", overwrite=True)


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    parameters = dict(load(base).get_submodule("transformer.h.0.attn.c_attn").named_parameters())
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


def test_finite() -> None:
    for tensor in (torch.ones(2), torch.ones(0), torch.tensor([1, 2])):
        assert require_finite("w", tensor) is tensor
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(CheckpointError, match=r"^w holds NaN or infinity: it diverged$"):
            require_finite("w", torch.tensor([1.0, value]), "it diverged")

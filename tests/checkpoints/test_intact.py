"""A changed byte in a base or an adapter is found: when it is first used, by an export, and by `qosora verify`."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import load, make_base, make_trained

from qosora.base.describe import describe, verify
from qosora.base.load import load_base, load_model
from qosora.checkpoints import intact
from qosora.checkpoints.intact import hashed, require_intact, verify_files
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.cli import main
from qosora.errors import CheckpointError
from qosora.export import export_merged


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained(tmp_path_factory.mktemp("trained"), "llama").base


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    copied: Path = shutil.copytree(base, tmp_path / "base")
    return copied


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_any_flipped_bit_is_found(base: Path, tmp_path: Path):
    size = 8 * (base / "model.safetensors").stat().st_size
    drawn = random.Random(0)
    for number, bit in enumerate([0, size - 1, *(drawn.randrange(size) for _ in range(30))]):
        copy = shutil.copytree(base, tmp_path / f"base{number}")
        flip(copy / "model.safetensors", bit)
        said = r"model.safetensors has changed since the manifest was written"
        assert len(verify(copy)["problems"]) == 1
        for use in (load_base, describe, lambda folder: export_merged(folder, tmp_path / "export")):
            with pytest.raises(CheckpointError, match=said):
                use(copy)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("family", "shard"), [("llama", "1GB"), ("llama-tied-bias", "1GB"), ("mixtral", "60KB"), ("gpt2", "20KB")]
)
def test_any_flipped_bit_of_what_save_pretrained_wrote_is_found(family: str, shard: str, tmp_path: Path):
    load(make_base(tmp_path / "first", family)).save_pretrained(tmp_path / "base", max_shard_size=shard)
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    assert (len(files) > 1) == (shard != "1GB")
    assert not verify(tmp_path / "base")["problems"]
    load_base(tmp_path / "base")
    drawn = random.Random(0)
    for number in range(40):
        file = drawn.choice(files)
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        flip(file, drawn.randrange(8 * header, 8 * len(whole)))
        assert len(verify(tmp_path / "base")["problems"]) == 1, number
        with pytest.raises(CheckpointError, match=rf"{file.name}: .* has changed since it was saved"):
            load_base(tmp_path / "base")
        file.write_bytes(whole)
    for _ in range(40):  # in the header: told in one line, or the same base
        file = drawn.choice(files)
        whole = file.read_bytes()
        flip(file, drawn.randrange(8 * (8 + int.from_bytes(whole[:8], "little"))))
        with suppress(CheckpointError):
            assert same_tensors(load_base(tmp_path / "base"), load_base(tmp_path / "first"))
        file.write_bytes(whole)
    load_base(tmp_path / "base")


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    expected = other.state_dict()
    found = one.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_was_read_is_not_read_again(copy: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    digest = intact.file_digest

    def noted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(intact, "file_digest", noted)
    load_base(copy)
    load_base(copy)
    describe(copy)
    assert read == ["model.safetensors"]
    (copy / "model.safetensors").touch()
    load_base(copy)
    assert read == ["model.safetensors"] * 2
    verify(copy)
    assert len(read) == 2 + len(json.loads((copy / MANIFEST_NAME).read_text())["files"])


@pytest.mark.parametrize("memory", ["[]", "{", '{"a": 1}', None])
def test_without_a_memory_that_can_be_used(
    memory: str | None, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    if memory is None:
        home.write_text("a file where a folder would be")
    else:
        (home / "qosora").mkdir(parents=True)
        (home / "qosora" / "verified.json").write_text(memory)
    require_intact(copy)


@pytest.mark.parametrize(
    "files", ["none", 7, {"model.safetensors": 1}, {"../model.safetensors": {"bytes": 1, "sha256": "0"}}]
)
def test_a_manifest_of_another_form(files: object, copy: Path):
    (copy / MANIFEST_NAME).write_text(json.dumps({"files": files}))
    for use in (require_intact, verify_files, load_base):
        with pytest.raises(CheckpointError, match="files must say bytes and sha256 of each"):
            use(copy)


def test_missing_and_cut_files(copy: Path):
    (copy / "config.json").write_text("{}")
    (copy / "model.safetensors").unlink()
    problems = verify_files(copy)
    assert [text.split()[0] for text in problems] == ["config.json", "model.safetensors"]
    assert problems[1] == "model.safetensors is missing"
    assert hashed(copy, ["config.json"]) == {
        "config.json": {"bytes": 2, "sha256": intact.file_digest(copy / "config.json")}
    }


def test_a_changed_adapter_without_a_manifest(tmp_path: Path):
    trained = make_trained(tmp_path, "llama")
    weights = trained.adapter / "adapter_model.safetensors"
    flip(weights, 8 * weights.stat().st_size - 1)
    for use in (load_model, describe, lambda folder: export_merged(trained.base, tmp_path / "export", folder)):
        with pytest.raises(CheckpointError, match=r"adapter_model.safetensors has changed since adapter_config.json"):
            use(trained.adapter)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained = make_trained(tmp_path, "llama")
    assert main(["verify", str(trained.base)]) == 0
    assert "files as they were written" in capsys.readouterr().out
    assert main(["verify", str(trained.adapter)]) == 0  # by the hash in its config
    (trained.base / MANIFEST_NAME).rename(trained.base / "away")
    assert main(["verify", str(trained.adapter)]) == 1
    assert f"has no {MANIFEST_NAME}" in capsys.readouterr().err
    (trained.base / "away").rename(trained.base / MANIFEST_NAME)
    names = [file.name for file in trained.adapter.iterdir()]
    (trained.adapter / MANIFEST_NAME).write_text(json.dumps({"files": hashed(trained.adapter, names)}))
    assert main(["verify", str(trained.adapter)]) == 0
    assert "the adapter belongs to the base (fingerprint " in capsys.readouterr().out
    flip(trained.adapter / "adapter_model.safetensors", 8 * 2000)
    assert main(["verify", str(trained.adapter), "--json"]) == 1
    output = capsys.readouterr()
    assert len(json.loads(output.out)["problems"]) == 1
    assert "adapter_model.safetensors has changed" in output.err
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors has changed"):
        load_model(trained.adapter)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors has changed"):
        export_merged(trained.base, tmp_path / "export", trained.adapter)

"""No path of this machine is in what is published, and this machine finds what was named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny import make_trained

from qosora.base.load import load_model
from qosora.checkpoints import split_source
from qosora.errors import CheckpointError
from qosora.export import export_lora, export_merged
from qosora.export.original import original_of
from qosora.places import place_of, published_name
from qosora.remembered import recall, remember


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("place", "folder", "name"),
    [
        ("work/base", "work/run", "../base"),
        ("work/bases/a", "work/runs/b", "../../bases/a"),
        ("models/base", "home/user/runs/b", "./base"),
        ("work/run/base", "work/run", "./base"),
        ("work/run", "work/run", "./run"),
        ("work/model.gguf", "work/base", "../model.gguf"),
    ],
)
def test_names(tmp_path: Path, place: str, folder: str, name: str) -> None:
    for path in (tmp_path / place, tmp_path / folder):
        path.mkdir(parents=True, exist_ok=True)
    assert published_name(tmp_path / place, tmp_path / folder, "key") == name
    assert place_of(name, tmp_path / folder, "key") == str(tmp_path / place)
    assert published_name(tmp_path / place) == f"./{Path(place).name}"


@pytest.mark.parametrize("name", ["org/model", "gpt2"])
def test_a_hub_id_stays(tmp_path: Path, name: str) -> None:
    assert published_name(name, tmp_path, "key") == name
    assert place_of(name, tmp_path, "key") == name
    assert recall("places") == {}


def test_the_root_is_near_nothing() -> None:
    assert published_name("/home/user/base", "/tmp/adapter") == "./base"
    assert published_name("/base", "/adapter") == "./base"
    assert published_name("/home/user/models/large/base", "/home/user/run") == "./base"


def test_what_is_gone_is_named_as_it_was(tmp_path: Path) -> None:
    assert published_name(tmp_path / "gone" / "base", tmp_path / "a" / "b" / "c") == "./base"
    for key in (None, "unknown"):
        assert place_of("./base", tmp_path, key) == "./base"
    remember("places", {"key": str(tmp_path / "gone")})
    assert place_of("./base", tmp_path, "key") == "./base"


def test_a_home_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert published_name("~/base", tmp_path / "run") == "../base"


def test_nothing_that_is_written_holds_a_path(tmp_path: Path) -> None:
    trained = make_trained(tmp_path, "llama")
    export_merged(trained.base, tmp_path / "merged", trained.adapter)
    export_merged(trained.base, tmp_path / "onto", trained.adapter, onto="original")
    export_lora(trained.base, tmp_path / "lora", trained.adapter)
    read = 0
    for folder in (trained.base, trained.adapter, *(tmp_path / name for name in ("merged", "onto", "lora"))):
        for file in folder.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file
            read += 1
    assert read >= 20
    card = ModelCard.load(trained.adapter / "README.md").data
    assert card.get("base_model") is None
    assert not [tag for tag in card.tags if tag.startswith("base_model:")]
    assert card.library_name == "peft"


def test_folders_that_move_together_find_each_other(tmp_path: Path) -> None:
    trained = make_trained(tmp_path / "here", "llama")
    (tmp_path / "here").rename(tmp_path / "there")
    base, adapter = (str(tmp_path / "there" / folder.name) for folder in (trained.base, trained.adapter))
    assert split_source(adapter) == (base, adapter)
    load_model(adapter)
    assert original_of(Path(base)) == str(tmp_path / "there" / trained.original.name)


def test_an_adapter_that_moved_alone_knows_its_base_on_this_machine(tmp_path: Path) -> None:
    trained = make_trained(tmp_path / "a", "llama")
    moved = shutil.move(trained.adapter, tmp_path / "elsewhere")
    load_model(moved)
    remember("places", dict.fromkeys(recall("places"), "gone"))
    with pytest.raises(CheckpointError, match=r"names the base \.\./base, and no such folder is there"):
        load_model(moved)
    load_model(moved, base=trained.base)


def test_what_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "qosora" / "subject.json"
    assert recall("subject") == {}
    remember("subject", {"a": 1, "b": 2})
    remember("subject", {"a": 3})
    assert recall("subject") == {"b": 2, "a": 3}
    assert list(json.loads(file.read_text())) == ["b", "a"]
    for broken in ("[]", "{", "[" * 100_000):
        file.write_text(broken)
        assert recall("subject") == {}
    file.unlink()
    file.mkdir()
    remember("subject", {"a": 1})
    assert recall("subject") == {}

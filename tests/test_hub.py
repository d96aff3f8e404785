"""What goes to the hub: up and down through the hub's own library, to a stand-in that speaks its protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in_hub
import yaml
from stand_in_hub import Hub
from tiny import make_checkpoint, sums, write_jsonl

from qosora import QosoraConfig, TrainConfig, export_lora, hub, quantize, train
from qosora.checkpoints import hashed, read_json
from qosora.checkpoints.names import ADAPTER_CONFIG, MANIFEST_NAME
from qosora.errors import CheckpointError, ConfigError, QosoraError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter with a run's files, and exports."""
    folder = tmp_path_factory.mktemp("pushed")
    source = make_checkpoint(folder / "source", "llama-text")
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [old]\n---\n# Theirs\nWhat they say.\n")
    quantize(source, folder / "base", QosoraConfig(rank=8))
    data = [write_jsonl(folder / f"{name}.jsonl", sums(8)) for name in ("train", "test")]
    train(TrainConfig(model=str(folder / "base"), data=str(data[0]), eval_data=str(data[1]), max_steps=2,
                      output_dir=str(folder / "adapter"), progress=False))  # fmt: skip
    export_lora(folder / "base", folder / "lora", folder / "adapter")
    return folder


@pytest.fixture
def there() -> Iterator[Hub]:
    with stand_in_hub.running() as found:
        yield found


def qosora(
    there: Hub, home: Path, *args: str | Path, token: str = stand_in_hub.TOKEN
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": there.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    command = [sys.executable, "-m", "qosora", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, check=False)


def head(there: Hub, repo: str) -> dict[str, Any]:
    text = there.repos[repo]["README.md"].decode()
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_base_and_its_adapter_there_and_back(folder: Path, there: Hub, tmp_path: Path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = qosora(there, tmp_path, "push", folder / "base", "me/base", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{there.address}/me/base"
    assert there.private == {"me/base": True}
    assert head(there, "me/base")["license"] == "apache-2.0"
    assert "# Theirs" in there.repos["me/base"]["README.md"].decode()
    done = qosora(there, tmp_path, "push", folder / "adapter", "me/adapter", "--base", "me/base", "--json")
    assert json.loads(done.stdout) == {"address": f"{there.address}/me/adapter"}
    assert head(there, "me/adapter")["base_model"] == "me/base"
    card = there.repos["me/adapter"]["README.md"].decode()
    assert "| data | train.jsonl |" in card
    assert "| evaluation loss | " in card
    assert "More Information" not in card
    assert not {"result.json", "train_config.yaml", "report.html", "made_of.json"} & there.repos["me/adapter"].keys()
    for repo, files in there.repos.items():
        for name, content in files.items():
            assert str(folder).encode() not in content, f"{repo}/{name} names a folder of this machine"
    assert {path: path.read_bytes() for path in before} == before

    got = qosora(there, tmp_path, "generate", "me/adapter", "--prompt", "1 + 2 =", "--max-new-tokens", "2")
    assert got.returncode == 0, got.stderr
    here = qosora(there, tmp_path, "generate", folder / "adapter", "--prompt", "1 + 2 =", "--max-new-tokens", "2")
    assert got.stdout == here.stdout
    for repo in ("me/base", "me/adapter"):
        copy = tmp_path / repo
        for name, content in there.repos[repo].items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(content)
        manifest = read_json(copy / MANIFEST_NAME)
        assert hashed(copy, manifest["files"]) == manifest["files"]


def test_exports(folder: Path, there: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert qosora(there, tmp_path, "push", folder / "lora", "me/lora").returncode == 0
    command: list[str | Path] = ["export", folder / "adapter", tmp_path / "merged", "--push-to-hub", "me/merged"]
    assert qosora(there, tmp_path, *command).stdout.splitlines()[-1] == f"{there.address}/me/merged"
    assert head(there, "me/merged")["library_name"] == "transformers"
    assert head(there, "me/lora") == {
        "tags": ["qosora"], "library_name": "peft", "base_model": "source",
    }  # fmt: skip
    assert "the adapter adapter on the base base" in there.repos["me/merged"]["README.md"].decode()


def test_what_is_refused_before_anything_goes(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'a b' is no name of a repository"):
        hub.push(folder / "base", "a b")
    with pytest.raises(ConfigError, match=r"the base of .*adapter is \.\./base, which nobody else has; .*--base"):
        hub.push(folder / "adapter", "me/adapter")
    with pytest.raises(ConfigError, match="is no adapter, so it has no base"):
        hub.push(folder / "base", "me/base", base="me/other")
    with pytest.raises(CheckpointError, match="holds no base, adapter or export"):
        hub.push(tmp_path, "me/nothing")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no base, adapter or export"):
        hub.push(tmp_path / "plain", "me/plain")


def test_a_damaged_folder_stays(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder / "adapter", copy], check=True)
    config = copy / ADAPTER_CONFIG
    config.write_text(config.read_text().replace("both", "s"))
    with pytest.raises(CheckpointError, match=r"adapter_config.json has (changed|\d+ bytes)"):
        hub.push(copy, "me/copy", base="me/base")


def test_a_hub_that_refuses(folder: Path, there: Hub, tmp_path: Path):
    done = qosora(there, tmp_path, "push", folder / "base", "me/base", token="hf_wrong")
    assert done.returncode == 1
    assert "the hub does not take me/base: " in done.stderr
    assert "log in with `hf auth login` [Q-RUN]" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not there.repos


def test_a_hub_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(QosoraError, match="does not take me/base: Network is unreachable"):
        hub.push(folder / "base", "me/base")

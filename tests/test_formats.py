"""What older versions of qosora stored is read, and what newer ones will store is refused in one line.

`stored/` has a base and adapters as each version of the formats wrote them, on a Llama, gpt-oss, Gemma or DBRX of one
layer, with the logits that they gave.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint, make_trained
from transformers import AutoModelForCausalLM

from qosora import formats
from qosora.base import load_base, load_model, quantize
from qosora.base.describe import describe, verify
from qosora.checkpoints.unfinished import UnfinishedFolder
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import CheckpointError
from qosora.export import export_merged
from qosora.formats import require_known
from qosora.training.config import TrainConfig
from qosora.training.run_folder import STEP_EXAMPLES, RunFolder

STORED = Path(__file__).parent / "stored"
VERSIONS = sorted(int(path.name.partition("-")[2]) for path in STORED.glob("base-*"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(12)[None]).logits[0, -1]
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_older_ones_are_read(version: int, tmp_path: Path):
    base, adapter = STORED / f"base-{version}", STORED / f"adapter-{version}"
    expected = json.loads((STORED / f"logits-{version}.json").read_text())
    export_merged(base, tmp_path / "merged", adapter, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for kind, model in (
        ("base", load_base(base, dtype=torch.float32)),
        ("adapter", load_model(adapter, dtype=torch.float32)),
        ("adapter", merged),
    ):
        torch.testing.assert_close(logits(model), torch.tensor(expected[kind]), rtol=1e-4, atol=2e-6)
    assert not verify(base)["problems"]
    assert describe(base)["decomposed_layers"] == {3: 8, 4: 8, 6: 14}.get(version, 7)


@pytest.mark.parametrize("name", ["adapter-2-update", "adapter-2-tokens"])
def test_an_adapter_with_more_than_vectors(name: str):
    expected = json.loads((STORED / "logits-2.json").read_text())[name]
    model = load_model(STORED / name, dtype=torch.float32)
    torch.testing.assert_close(logits(model), torch.tensor(expected), rtol=1e-4, atol=2e-6)


def test_the_newest_is_among_them():
    assert list(range(1, formats.BASE + 1)) == VERSIONS
    newest = json.loads((STORED / f"base-{formats.BASE}" / "config.json").read_text())["quantization_config"]
    assert newest["format_version"] == formats.BASE


def test_all_say_their_version(tmp_path: Path):
    trained = make_trained(tmp_path, "llama")
    base, adapter = (
        json.loads((folder / name).read_text())
        for folder, name in ((trained.base, "config.json"), (trained.adapter, "adapter_config.json"))
    )
    assert base["quantization_config"]["format_version"] == formats.BASE_WITHOUT_STACKS
    assert adapter["format_version"] == formats.ADAPTER_WITHOUT_TOKENS
    manifest = json.loads((trained.base / "qosora_manifest.json").read_text())
    assert manifest["format_version"] == formats.MANIFEST


@pytest.mark.parametrize("version", [99, 10**30, 0, -1, "2", 2.0, True, [1]])
def test_newer_ones_are_refused(version: Any, tmp_path: Path):
    newer = version in (99, 10**30)
    said = re.compile(
        rf"has format version {version}, .* up to \d: update qosora" if newer else "format_version must be a positive"
    )
    base = shutil.copytree(STORED / "base-2", tmp_path / "base-2")
    adapter = shutil.copytree(STORED / "adapter-2", tmp_path / "adapter-2")
    merged = tmp_path / "merged"

    def change(file: Path, *keys: str) -> None:
        whole = json.loads(file.read_text())
        part = whole
        for key in keys:
            part = part[key]
        part["format_version"] = version
        file.write_text(json.dumps(whole))

    kept = (base / "config.json").read_text()
    change(base / "config.json", "quantization_config")
    for use in (load_base, describe, load_model, lambda folder: export_merged(folder, merged)):
        with pytest.raises(CheckpointError, match=said) as error:
            use(base)
        assert "config.json" in str(error.value)
        assert "\n" not in str(error.value)
    (base / "config.json").write_text(kept)

    kept = (base / "qosora_manifest.json").read_text()
    change(base / "qosora_manifest.json")
    for use in (load_base, describe, verify, lambda folder: export_merged(folder, merged)):
        with pytest.raises(CheckpointError, match=said) as error:
            use(base)
        assert "qosora_manifest.json" in str(error.value)
    (base / "qosora_manifest.json").write_text(kept)

    change(adapter / "adapter_config.json")
    for use in (load_model, describe, lambda folder: export_merged(base, merged, folder)):
        with pytest.raises(CheckpointError, match=said) as error:
            use(adapter)
        assert "adapter_config.json" in str(error.value)
    assert not merged.exists()


def test_an_unfinished_folder(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source")

    def stop(progress: Any) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "base", QosoraConfig(rank=4), progress=stop)
    file = tmp_path / "base.partial" / "job.json"
    begun = json.loads(file.read_text())
    assert begun["format_version"] == formats.UNFINISHED
    file.write_text(json.dumps({**begun, "format_version": 99}))
    with pytest.raises(CheckpointError, match=r"job.json has format version 99, and .* update qosora"):
        quantize(source, tmp_path / "base", QosoraConfig(rank=4))
    file.write_text(json.dumps(begun["job"]))  # as before there were versions
    quantize(source, tmp_path / "base", QosoraConfig(rank=4))
    assert isinstance(UnfinishedFolder(tmp_path / "x", {}, {}, 1).job["tensors"], str)


def test_a_run(tmp_path: Path):
    folder = tmp_path / "run"
    config = TrainConfig(model="base", data="train.jsonl", output_dir=str(folder), resume=True)
    made_of = {"the training data": "a", STEP_EXAMPLES: config.batch_size * config.gradient_accumulation}
    RunFolder(config).begin(0, made_of)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    RunFolder(config).check_made_of(made_of)
    (folder / "made_of.json").write_text('{"format_version": 99}')
    with pytest.raises(CheckpointError, match=r"made_of.json has format version 99, and .* update qosora"):
        RunFolder(config).check_made_of(made_of)


def test_what_is_made_is_of_the_newest():
    assert QosoraConfig().to_dict()["format_version"] == formats.BASE_WITHOUT_STACKS
    embeddings = {formats.BASE_WITH_INT8: "8bit", formats.BASE_WITH_EMBEDDINGS: "4bit"}
    for version in (formats.BASE_WITHOUT_STACKS, formats.BASE_WITH_STACKS, formats.BASE, *embeddings):
        stored = QosoraConfig(embeddings=embeddings.get(version)).to_dict()
        stored["format_version"] = version
        assert QosoraConfig.from_dict(stored).to_dict() == stored
    assert OsoraConfig().to_dict()["format_version"] == formats.ADAPTER_WITHOUT_TOKENS
    assert OsoraConfig(trainable_token_indices=[1]).to_dict()["format_version"] == formats.ADAPTER
    require_known("file", None, 1)
    require_known("file", 1, 1)
